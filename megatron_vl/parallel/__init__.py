"""Process groups, one pipeline step, gradients: what is thin over megatron-core's parallelism."""
