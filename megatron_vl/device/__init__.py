"""CPU and CUDA behind one face, and megatron-core on both.

- `machine`: the device of this process, and what it can do;
- `processes`: this process among the others: its rank, and dying with its launcher;
- `process_group`: joining the others;
- `import_hook` (with `source_rewrite`, `cuda_shim`, `megatron_repairs`, `fused_adam`): megatron-core on hosts
  without CUDA or without TransformerEngine, unmodified on disk.

Importing this package imports no torch and picks no device.
"""
