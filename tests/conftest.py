"""One thread per process: tests run beside each other, and sums come out the same everywhere."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is imported

import megatron_vl  # noqa: F401  (before any test imports megatron.core)
