"""From raw material to indexed shards."""
