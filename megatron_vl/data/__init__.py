"""From indexed webdataset shards to the microbatches of a step; every choice is a function of (seed, step, state)."""
