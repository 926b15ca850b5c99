"""Runs a rank's real code on tensors that have shapes and no data, in a world whose other ranks do not exist."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import FakeWork
from torch.nn import functional
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

META = torch.device("meta")
_PREFIX = (
    "torch.cuda." if torch.cuda.is_available() else "torch."
)  # megatron-core tells parameters by such names
_TYPE_NAMES = {torch.float32: f"{_PREFIX}FloatTensor", torch.bfloat16: f"{_PREFIX}BFloat16Tensor"}


@contextmanager
def imagined_world(rank: int, world_size: int) -> Iterator[None]:
    """This process is `rank` of a world in which every collective ends at once and changes nothing."""
    dist.init_process_group("cpu:fake,meta:fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextmanager
def without_data() -> Iterator[None]:
    """Floating-point tensors that are made here have no data; integers and masks do, and what is made of them."""
    with _NoData(), _cpu_kernels():  # type: ignore[no-untyped-call]
        yield


class _NoData(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if not tensors:
            return func(*args, **self._made_on_meta(func, kwargs))
        if not any(tensor.is_meta for tensor in tensors):
            return func(*args, **kwargs)
        if func.namespace == "c10d":
            work = FakeWork().boxed()
            return work if len(func._schema.returns) == 1 else (args[0], work)
        if kwargs.get("device") is not None:
            kwargs["device"] = META
        args, kwargs = tree_map_only(Tensor, _on_meta, (args, kwargs))
        return func(*args, **kwargs)

    @staticmethod
    def _made_on_meta(func: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        dtype = kwargs.get("dtype") or torch.get_default_dtype()
        has_device = any(argument.name == "device" for argument in func._schema.arguments)
        return (
            kwargs | {"device": META, "pin_memory": None}
            if has_device and dtype.is_floating_point
            else kwargs
        )


def _on_meta(tensor: Tensor) -> Tensor:
    return tensor if tensor.is_meta else tensor.to(META)


@contextmanager
def _cpu_kernels() -> Iterator[None]:
    """What a CPU would do, where torch does something else for tensors without data."""
    unfused, type_of = functional.scaled_dot_product_attention, Tensor.type

    def attention(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        bias = options.get("attn_mask")
        if not query.is_meta or (bias is not None and bias.requires_grad):
            return unfused(query, key, value, **options)
        causal, scale = options.get("is_causal", False), options.get("scale")
        attended: Tensor = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, causal, attn_mask=bias, scale=scale
        )[0]
        return attended

    def type_or_name(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        return _TYPE_NAMES[tensor.dtype] if tensor.is_meta and not args else type_of(tensor, *args, **kwargs)

    attention_patch = patch.object(functional, "scaled_dot_product_attention", attention)
    with attention_patch, patch.object(Tensor, "type", type_or_name):
        yield
