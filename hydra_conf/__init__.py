"""Values of the configuration, by group; the schema is `megatron_vl.config`."""
