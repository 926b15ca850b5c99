"""Imports what all test ranks need, once, into the process that they are forked from.

It ends with whoever started it, however that ends, and the ranks end with it: by itself it would wait for them.
"""

import importlib

from megatron_vl.device.processes import die_with_parent

die_with_parent()
for name in (
    "hypothesis",
    "pytest",
    "megatron_vl",  # before megatron-core
    "megatron.core.dist_checkpointing",
    "megatron.core.distributed",
    "megatron.core.models.gpt",
    "megatron.core.optimizer",
    "megatron.core.pipeline_parallel",
):
    importlib.import_module(name)
