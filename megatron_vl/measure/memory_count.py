"""Counts the bytes of tensors that a rank really holds, and the most that it held at once.

For tensors on the CPU or without data: there the backward pass runs in the thread that counts.
"""

import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, UntypedStorage, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveStorages(TorchDispatchMode):
    """While it is entered: the storages that operators made and that are still alive, whoever holds them.

    A storage counts once, whatever looks at it. What kernels allocate and free within one operator is not seen.

    Attributes:
        live_bytes: of all storages now.
        peak_bytes: the most since the last `restart_peak`.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live_bytes = 0
        self.peak_bytes = 0
        self._known: dict[int, weakref.ref[UntypedStorage]] = {}

    def restart_peak(self) -> None:
        self.peak_bytes = self.live_bytes

    def leave_out(self, tensors: Iterable[Tensor]) -> None:
        """Tensors made elsewhere, which operators may return views of."""
        for tensor in tensors:
            self._remember(tensor.untyped_storage(), num_bytes=0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for made in tree_leaves(result):
            if isinstance(made, Tensor):
                storage = made.untyped_storage()
                if id(storage) not in self._known:
                    self._remember(storage, storage.nbytes())
        return result

    def _remember(self, storage: UntypedStorage, num_bytes: int) -> None:
        key = id(storage)

        def forget(_: object) -> None:
            del self._known[key]
            self.live_bytes -= num_bytes

        self._known[key] = weakref.ref(storage, forget)
        self.live_bytes += num_bytes
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)


@dataclass(frozen=True, kw_only=True)
class HeldMemory:
    """Bytes of what a rank holds between steps; once each, whatever shares them."""

    parameters: int
    gradients: int  # the buffers that they accumulate in
    optimizer: int  # main parameters, where they are copies, and Adam's means

    @property
    def total(self) -> int:
        return self.parameters + self.gradients + self.optimizer


def held_memory(chunks: Iterable[Any], optimizer: Any, copies: Iterable[nn.Parameter] = ()) -> HeldMemory:
    """Of megatron-core's wrapped chunks, of its optimizer, which has taken a step, and of copies of other ranks'
    parameters, which may have a `main_grad`."""
    chunks, copies = list(chunks), list(copies)
    gradients = [buffer.grad_data for chunk in chunks for buffer in chunk.buffers]
    gradients += [copy.main_grad for copy in copies if hasattr(copy, "main_grad")]
    parameters = [parameter for chunk in chunks for parameter in chunk.parameters()]
    seen: set[int] = set()
    return HeldMemory(
        parameters=_storage_bytes([*parameters, *copies], seen),
        gradients=_storage_bytes(gradients, seen),
        optimizer=_storage_bytes(_optimizer_tensors(optimizer), seen),
    )


def _optimizer_tensors(optimizer: Any) -> Iterator[Tensor]:
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        for group in part.param_groups:
            yield from group["params"]
        for state in part.optimizer.state.values():
            yield from (value for value in state.values() if torch.is_tensor(value))


def _storage_bytes(tensors: Iterable[Tensor], seen: set[int]) -> int:
    """Of the storages that are not `seen` yet."""
    total = 0
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if storage._cdata not in seen:
            seen.add(storage._cdata)
            total += storage.nbytes()
    return total
