"""How a model is spread over ranks, and what is recomputed in the backward pass."""

from dataclasses import dataclass


@dataclass(kw_only=True)
class ParallelConfig:
    """Parallel sizes. The data-parallel size is what remains: world / (tensor_size * pipeline_size).

    `layout` is megatron-core's pipeline layout string ("Et|tttL": E stage zero, t one decoder layer, L head and
    loss, stages separated by |, virtual stages included); null divides the layers evenly.
    """

    tensor_size: int = 1
    pipeline_size: int = 1
    virtual_size: int = 1
    sequence_parallel: bool = False
    layout: str | None = None
    overlap_grad_reduce: bool = True
    overlap_param_gather: bool = True
    transformer_engine: bool = True  # CUDA only; false asks for megatron-core's local layers


@dataclass(kw_only=True)
class RecomputeConfig:
    """`language`: none, selective (core attention) or full. `vision`: recompute each encoder block."""

    language: str = "none"
    vision: bool = False
