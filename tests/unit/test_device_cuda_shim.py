"""The stand-in for torch.cuda."""

import pytest
import torch

from megatron_vl.device import cuda_shim


def test_random_state_is_the_cpus() -> None:
    cuda_shim.manual_seed(3)
    state = cuda_shim.get_rng_state()
    first = torch.randn(4)
    cuda_shim.set_rng_state(state)
    assert torch.equal(torch.randn(4), first)
    cuda_shim.default_generators[cuda_shim.current_device()].set_state(state)
    assert torch.equal(torch.randn(4), first)


def test_streams_and_events_are_always_done() -> None:
    stream, event = cuda_shim.Stream(priority=-1), cuda_shim.Event(enable_timing=True)
    with cuda_shim.stream(stream), cuda_shim.device(0):
        event.record(stream)
        stream.wait_event(event)
        stream.wait_stream(cuda_shim.current_stream())
    assert stream.query()
    assert stream.record_event().query()


def test_what_it_lacks_is_the_real_torch_cuda() -> None:
    assert cuda_shim.OutOfMemoryError is torch.cuda.OutOfMemoryError
    with pytest.raises(AttributeError, match="no_such_name"):
        cuda_shim.no_such_name  # noqa: B018
