"""Stands in for torch.cuda in megatron-core's code on a host without CUDA (see `import_hook`).

The one device is the CPU, work is done when a call returns, and there is one random generator. What
megatron-core does not use while training on a CPU falls through to the real torch.cuda, with its errors.
"""

import contextlib
import logging
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch

# ---- devices and memory


def current_device() -> torch.device:
    return torch.device("cpu")


def device_count() -> int:
    return 1


def is_available() -> bool:
    return False


def set_device(device: object) -> None:
    """There is but one."""


def synchronize(device: object = None) -> None:
    """Work on a CPU is done when its call returns."""


def get_device_capability(device: object = None) -> tuple[int, int]:
    return (0, 0)


def empty_cache() -> None:
    """The CPU's allocator caches nothing that torch could give back."""


def memory_allocated(device: object = None) -> int:
    return 0


memory_reserved = max_memory_allocated = max_memory_reserved = memory_allocated


def memory_stats(device: object = None) -> dict[str, int]:
    return {}


@contextlib.contextmanager
def device(device: object) -> Iterator[None]:
    """The context manager `torch.cuda.device(index)`."""
    yield


# ---- streams and events: all work is in one order already


class Event:
    """An event that has always happened."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def record(self, stream: object = None) -> None:
        pass

    def wait(self, stream: object = None) -> None:
        pass

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass


class Stream:
    """A stream with nothing left to do."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def wait_stream(self, stream: object) -> None:
        pass

    def wait_event(self, event: object) -> None:
        pass

    def record_event(self, event: Event | None = None) -> Event:
        return event or Event()

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass


_STREAM = Stream()


def current_stream(device: object = None) -> Stream:
    return _STREAM


default_stream = current_stream


@contextlib.contextmanager
def stream(stream: object) -> Iterator[None]:
    """The context manager `torch.cuda.stream(stream)`."""
    yield


def is_current_stream_capturing() -> bool:
    return False


# ---- random numbers: CUDA's generator is the CPU's


def get_rng_state(device: object = None) -> torch.Tensor:
    return torch.get_rng_state()


def set_rng_state(state: torch.Tensor, device: object = None) -> None:
    torch.set_rng_state(state)


def manual_seed(seed: int) -> None:
    torch.manual_seed(seed)


class _Generators:
    """`default_generators[i]`, where `i` is whatever names the device."""

    def __getitem__(self, index: object) -> torch.Generator:
        return torch.default_generator


default_generators = _Generators()

# Megatron-core takes it for a mistake when the CPU's generator moves while CUDA's is in use. Here it has to.
logging.getLogger("megatron.core.tensor_parallel.random").addFilter(
    lambda record: record.msg != "CPU RNG state changed within GPU RNG context"
)
random = SimpleNamespace(get_rng_state=get_rng_state, set_rng_state=set_rng_state, manual_seed=manual_seed)


# ---- initialisation, profiling marks, tensor types


def _lazy_init() -> None:
    pass


def _lazy_call(call: Callable[[], Any], **kwargs: object) -> None:
    call()


@contextlib.contextmanager
def _nvtx_range(message: str) -> Iterator[None]:
    yield


nvtx = SimpleNamespace(
    range_push=lambda message: 0, range_pop=lambda: 0, mark=lambda message: None, range=_nvtx_range
)

FloatTensor, HalfTensor, BFloat16Tensor = torch.FloatTensor, torch.HalfTensor, torch.BFloat16Tensor


def __getattr__(name: str) -> Any:
    """Everything else is the real torch.cuda's (PEP 562)."""
    return getattr(torch.cuda, name)
