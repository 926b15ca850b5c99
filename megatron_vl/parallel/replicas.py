"""Parameters that several ranks hold must be the same to the last bit.

A flipped bit in a weight says nothing: losses stay plausible. Ranks of the same place in the model hold the same
parameters (data parallelism); tensor-parallel ranks share those whose gradients are summed or averaged among them
every step; and a rank's fp32 main parameters, rounded, are its share of the parameters.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from megatron_vl.planning.topology import Topology

NUM_WITNESSES = 3  # numbers that a rank tells
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}  # by bytes of an element
_ODD = 0x5851F42D4C957F2D  # a multiplier of linear congruential generators (Knuth)
_EXACT_BITS = 52  # of an integer as a floating-point number of 64


def witnesses(chunks: Sequence[Any], optimizer: Any, with_images: bool) -> Tensor:
    """What this rank's parameters are, in three numbers (fp64, on the device): digests of all of them and of those
    equal over tensor ranks, and how many are not its main parameters, rounded.

    To be called between a step's backward pass and its update: then what this step computed with is compared, and all
    parameters are gathered that it used. Without images those are not the encoders'. Reads every parameter once.

    Args:
        chunks: wrapped for data parallelism.
        optimizer: megatron-core's.
    """
    named = [pair for chunk in chunks for pair in chunk.module.named_parameters()]
    used = [
        parameter
        for name, parameter in named
        if with_images or not name.startswith(("stage_zero.towers.", "stage_zero.adaptor."))
    ]
    device = named[0][1].device
    shared = (parameter for parameter in used if _is_equal_over_tensor_ranks(parameter))
    told = [digest(used, device), digest(shared, device), _rounding_errors(optimizer, device)]
    return torch.stack(told).bitwise_and((1 << _EXACT_BITS) - 1).double()


def suspects(told: Sequence[Sequence[float]], topology: Topology) -> list[int]:
    """Ranks whose parameters are not those of their peers, or of their own main parameters; where as many hold one
    value as another, all of them. `told` has what `witnesses` says, by rank."""
    tensor_size, data_size = topology.tensor_size, topology.data_size
    found = {rank for rank, (_, _, wrong) in enumerate(told) if wrong}
    for first in range(0, topology.world_size, tensor_size * data_size):  # of each pipeline stage
        stage = range(first, first + tensor_size * data_size)
        for tensor_rank in range(tensor_size):
            found |= _minority(stage[tensor_rank::tensor_size], [one[0] for one in told])
        for replica in range(data_size):
            found |= _minority(stage[replica * tensor_size :][:tensor_size], [one[1] for one in told])
    return sorted(found)


def digest(tensors: Iterable[Tensor], device: torch.device) -> Tensor:
    """An int64 scalar: one bit that flips anywhere changes its lowest 52 bits, if it is not a 64-bit number's."""
    combined = torch.zeros((), dtype=torch.int64, device=device)
    for tensor in tensors:
        total = tensor.detach().contiguous().view(_INTEGERS[tensor.element_size()]).sum(dtype=torch.int64)
        combined = combined * _ODD + total  # modulo 2^64, as integers wrap
    return combined


def _minority(ranks: Sequence[int], digests: Sequence[float]) -> set[int]:
    counts = Counter(digests[rank] for rank in ranks).most_common(2)
    if len(counts) < 2:
        return set()
    if counts[0][1] == counts[1][1]:
        return set(ranks)
    return {rank for rank in ranks if digests[rank] != counts[0][0]}


def _is_equal_over_tensor_ranks(parameter: nn.Parameter) -> bool:
    """By a reduction or since it is frozen. What is only computed alike may differ in the last bit on some devices."""
    if getattr(parameter, "tensor_model_parallel", False):
        return False
    reduced = ("sequence_parallel", "average_gradients_across_tp_domain")
    return not parameter.requires_grad or any(getattr(parameter, name, False) for name in reduced)


def _rounding_errors(optimizer: Any, device: torch.device) -> Tensor:
    """How many of this rank's parameters are not its main parameters, rounded."""
    wrong = torch.zeros((), dtype=torch.int64, device=device)
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        groups = zip(part.shard_float16_groups, part.shard_fp32_from_float16_groups, strict=True)
        for model_group, main_group in groups:
            for model, main in zip(model_group, main_group, strict=True):
                integer = _INTEGERS[model.element_size()]
                wrong += (main.to(model.dtype).view(integer) != model.view(integer)).sum()
    return wrong
