"""A step reads from the device once, whatever its parallel setting.

On CPU nothing has to be waited for, so what is counted is every read of a tensor's values by Python and every operation
whose result's shape depends on values: on CUDA each of them waits for the device.
"""

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_vl.config.parallel import ParallelConfig
from megatron_vl.train.step import Vote, train_step
from tests.support.ranks import run_ranks
from tests.support.training import Case, batch, build, shared

READS = ("item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__", "__iter__")
SHAPES_FROM_VALUES = {
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.masked_select.default,
    torch.ops.aten._unique2.default,
    torch.ops.aten.repeat_interleave.Tensor,
}
# What does not happen on CUDA: TransformerEngine's attention takes the bounds as they are on the device, the count of
# image tokens is checked on CPU alone, and the length of a row is read before it is sent to the device. Around sequence
# parallel layers megatron-core compares the host's random state.
ON_CPU_ALONE = {
    ("attention.py", "forward"),
    ("stage_zero.py", "_splice"),
    ("microbatch.py", "num_tokens"),
    ("random.py", "fork"),
}
CASES = {
    "one": Case(),
    "bf16": Case(precision="bf16"),
    "tp2_sp": Case(parallel=ParallelConfig(tensor_size=2, sequence_parallel=True)),
    "pp2": Case(parallel=ParallelConfig(pipeline_size=2)),
    "dp2": Case(train=("adaptor", "decoder")),
}

Sites = Counter[tuple[str, str]]


def site() -> tuple[str, str]:
    """The file and function outside torch and this test that is running."""
    frame: Any = sys._getframe(1)
    while "/torch/" in frame.f_code.co_filename or frame.f_code.co_filename == __file__:
        frame = frame.f_back
    return Path(frame.f_code.co_filename).name, frame.f_code.co_name


class Operations(TorchDispatchMode):
    def __init__(self, sites: Sites) -> None:
        super().__init__()
        self.sites = sites

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in SHAPES_FROM_VALUES:
            self.sites[site()] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def counted() -> Iterator[Sites]:
    """Where values are read; a read that is also an operation counts once."""
    reads, operations = Counter(), Counter()
    with pytest.MonkeyPatch.context() as patch:
        for name in READS:
            patch.setattr(torch.Tensor, name, _counting(getattr(torch.Tensor, name), reads))
        sites: Sites = Counter()
        with Operations(operations):
            yield sites
    sites |= reads | operations


def _counting(method: Callable[..., Any], sites: Sites) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        sites[site()] += 1
        return method(*args, **kwargs)

    return call


def sites_of_a_step(case: Case) -> Sites:
    """Of the third step, which is multimodal, on this rank."""
    chunks, optimizer, groups = build(case)
    steps = [shared(batch(case, step, groups), case, groups) for step in (1, 2, 3)]
    for microbatches in steps[:2]:
        train_step(chunks, optimizer, microbatches, groups, 1.0, Vote())
    with counted() as sites:
        train_step(chunks, optimizer, steps[2], groups, 1.0, Vote(sources=("random",)))
    return sites


@pytest.mark.parametrize("name", CASES)
def test_a_step_reads_from_the_device_once(name: str) -> None:
    for sites in run_ranks(1 if name in ("one", "bf16") else 2, sites_of_a_step, CASES[name]):
        found = {where: number for where, number in sites.items() if where not in ON_CPU_ALONE}
        assert found == {("step.py", "train_step"): 1}
