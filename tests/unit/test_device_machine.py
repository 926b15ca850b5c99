"""Which device a process gets, on this host and on one made up."""

import importlib.util
import os

import pytest
import torch

from megatron_vl.config.errors import UserError
from megatron_vl.device.machine import Device, pick_device, require_gpu_extra


def test_cpu_behind_the_face() -> None:
    device = Device("cpu")
    device.synchronize()
    assert (device.torch_device, device.backend) == (torch.device("cpu"), "gloo")


def test_memory_of_a_cpu_process() -> None:
    device, size_bytes = Device("cpu"), 2**28
    before_bytes = device.memory_bytes()
    ones = torch.ones(size_bytes, dtype=torch.uint8)
    with_it_bytes = device.memory_bytes()
    del ones
    slack_bytes = size_bytes // 8
    assert with_it_bytes - before_bytes == pytest.approx(size_bytes, abs=slack_bytes)
    assert device.memory_bytes() == pytest.approx(before_bytes, abs=slack_bytes)
    assert device.peak_memory_bytes() >= with_it_bytes - slack_bytes


def test_cuda_behind_the_face() -> None:
    device = Device("cuda", 3)
    assert (device.torch_device, device.backend) == (torch.device("cuda:3"), "nccl")


def test_a_host_without_cuda_gives_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device(local_rank=5) == Device("cpu", 5)


def test_a_host_with_cuda_gives_a_gpu_per_local_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "")
    monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS")
    assert pick_device(local_rank=1) == Device("cuda", 1)
    assert os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] == "1"
    assert chosen == [1]
    with pytest.raises(UserError, match=r"local rank 2 .* has 2"):
        pick_device(local_rank=2)


@pytest.mark.parametrize(
    ("installed", "named"),
    [
        ([], "transformer_engine .* and flash_attn"),
        (["transformer_engine"], "needs flash_attn"),
        (["flash_attn"], "needs transformer_engine"),
    ],
)
def test_what_cuda_needs_is_named(installed: list[str], named: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if name in installed else None)
    with pytest.raises(UserError, match=named) as error:
        require_gpu_extra(Device("cuda"), transformer_engine=True)
    assert "docs/install.md has the commands" in str(error.value)


def test_nothing_is_needed_for_local_layers_on_a_cpu_or_when_all_is_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    require_gpu_extra(Device("cpu"), transformer_engine=True)
    require_gpu_extra(Device("cuda"), transformer_engine=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    require_gpu_extra(Device("cuda"), transformer_engine=True)
