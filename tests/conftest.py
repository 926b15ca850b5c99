"""One thread per process: tests run beside each other, and sums come out the same everywhere.

No example has a deadline: how long one takes depends on what else the machine does.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is imported

from hypothesis import settings

import megatron_vl  # noqa: F401  (before any test imports megatron.core)

settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")
