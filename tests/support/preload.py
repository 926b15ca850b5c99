"""Imports what all test ranks need, once, into the process that they are forked from."""

import importlib

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
