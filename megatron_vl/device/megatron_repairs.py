"""What megatron-core 0.16 gets wrong, mostly without TransformerEngine, and the values that set it right.

`import_hook` gives a module its repairs right after it has run, so they hold before anyone can read them.
"""

import contextlib
import multiprocessing.dummy
from types import ModuleType
from typing import Any

import torch

from megatron_vl.device.fused_adam import FusedAdam
from megatron_vl.device.fused_rope import fused_rope, fused_rope_packed
from megatron_vl.device.fused_swiglu import swiglu, swiglu_back
from megatron_vl.device.process_group import group_of

_Repairs = dict[str, dict[str, Any]]  # module -> name in it -> value


class _Threads:
    """For torch.multiprocessing in `filesystem_async`: a checkpoint's writers are threads of their rank.

    Megatron-core forks them, from a process with threads whose locks may be held just then, and has their results
    served by a process that starts anew from the main module, for seconds and hundreds of megabytes per rank, and
    outlives a rank that is killed. Only saving in the background, which nothing here does, would need processes.
    """

    @staticmethod
    def get_context(method: str) -> ModuleType:
        return multiprocessing.dummy


class _NoFP8:
    """For TransformerEngine's FP8GlobalStateManager, where FP8 is never enabled."""

    @staticmethod
    def is_fp8_enabled() -> bool:
        return False


def _no_context(*args: object, **kwargs: object) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext()


def _as_it_is(function: Any) -> Any:
    return function


def _gather(output: Any, own: Any, group: Any, async_op: bool) -> Any:
    """Among one rank there is nothing to do, as both are the same memory, where gloo would copy it to itself."""
    if group.size() == 1:
        return None
    return torch.distributed.all_gather_into_tensor(output, own, group=group, async_op=async_op)


def _reduce_scatter(own: Any, whole: Any, op: Any, group: Any, async_op: bool) -> Any:
    """As `_gather`."""
    if group.size() == 1:
        return None
    return torch.distributed.reduce_scatter_tensor(own, whole, op=op, group=group, async_op=async_op)


def _as_numpy_on_cpu(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """For `maybe_move_tensor_to_cpu`, which forgets `as_numpy` where there is nothing to move."""
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


_EVERYWHERE: _Repairs = {
    # It makes a group, with a communicator or a thread of its own, for each of some twenty names of the same few sets
    # of ranks.
    "megatron.core.parallel_state": {"create_group": group_of},
    "megatron.core.dist_checkpointing.strategies.filesystem_async": {"mp": _Threads},
}

_WITHOUT_TRANSFORMER_ENGINE: _Repairs = {
    # With torch's AdamW the distributed optimizer cannot load its own checkpoint.
    "megatron.core.optimizer": {"Adam": FusedAdam, "USING_PYTORCH_OPTIMIZER": False},
    "megatron.core.optimizer.distrib_optimizer": {"Adam": FusedAdam, "HAVE_APEX_OR_TE": True},
    "megatron.core.models.common.embeddings.rope_utils": {
        "fused_apply_rotary_pos_emb": fused_rope,
        "fused_apply_rotary_pos_emb_thd": fused_rope_packed,
    },
    # True by mistake: the TransformerEngine layers it imports are mocks.
    "megatron.core.transformer.multi_latent_attention": {"HAVE_TE": False},
    # Named where it was never defined.
    "megatron.core.transformer.moe.moe_utils": {"te_general_gemm": None},
    "megatron.core.tensor_parallel.random": {
        "FP8GlobalStateManager": _NoFP8,
        "activation_recompute_forward": _no_context,
        "fp8_autocast": _no_context,
    },
}

_ON_CPU: _Repairs = {
    "megatron.core.distributed.param_and_grad_buffer": {
        "dist_all_gather_func": _gather,
        "dist_reduce_scatter_func": _reduce_scatter,
    },
    # torch.compile: a second to import its compiler, for fusions that are off on CPU.
    "megatron.core.jit": {"jit_fuser": _as_it_is},
    "megatron.core.fusions.fused_bias_swiglu": {"swiglu": swiglu, "swiglu_back": swiglu_back},
    "megatron.core.transformer.moe.token_dispatcher": {"maybe_move_tensor_to_cpu": _as_numpy_on_cpu},
}


def repairs_for_host(cuda: bool, transformer_engine: bool) -> _Repairs:
    """The values to set in modules of megatron-core, by module and name."""
    repairs = dict(_EVERYWHERE)
    if not transformer_engine:
        repairs |= _WITHOUT_TRANSFORMER_ENGINE
    if not cuda:
        repairs |= _ON_CPU
    return repairs
