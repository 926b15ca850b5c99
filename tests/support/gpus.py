"""Marks for tests that need GPUs: elsewhere they are skipped, and counted as skipped with the reason."""

from importlib.util import find_spec

import pytest
import torch


def needs_gpus(number: int) -> list[pytest.MarkDecorator]:
    """For `pytestmark` or `pytest.param(marks=…)`."""
    present = torch.cuda.device_count()
    reason = f"needs CUDA devices: {number}; this machine has {present}"
    return [pytest.mark.gpu, pytest.mark.skipif(present < number, reason=reason)]


needs_transformer_engine = pytest.mark.skipif(
    find_spec("transformer_engine") is None, reason="needs TransformerEngine: pip install 'megatron-vl[gpu]'"
)
