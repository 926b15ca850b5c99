"""How a model is spread over ranks, and what is recomputed in the backward pass."""

from dataclasses import dataclass

VISION_PLACEMENTS = ("replicated", "split", "spread")
RECOMPUTE = ("none", "selective", "full")


@dataclass(kw_only=True)
class ParallelConfig:
    """Parallel sizes. The data-parallel size is what remains: world / (tensor_size * pipeline_size).

    `layout` is megatron-core's pipeline layout string ("Et|tttL": E stage zero, t one decoder layer, L head and
    loss, stages separated by |, virtual stages included); null divides the layers evenly; auto has planning find the
    layout that makes each stage's steps fastest on `cluster`.

    `vision_placement` says which ranks encode the images of a replica's step. `replicated`: every tensor-parallel
    rank of stage zero all of them (the paper's way). `split`: each of these ranks its share, with encoders and
    adaptor; needs tensor_size of at least 2. `spread`: every rank of all stages its share, with copies of the encoders,
    before the pipeline begins; needs at least 2 ranks. Results differ by rounding only; a run may resume with another.
    Evaluation is always `replicated`.

    `compile_vision`: the backend of torch.compile for the encoders' blocks in training (`inductor` needs a C++
    compiler, and on CUDA Triton; the first steps then take minutes), null to run them as they are.
    """

    tensor_size: int = 1
    pipeline_size: int = 1
    virtual_size: int = 1
    sequence_parallel: bool = False
    layout: str | None = None
    vision_placement: str = "replicated"
    compile_vision: str | None = None
    overlap_grad_reduce: bool = True
    overlap_param_gather: bool = True
    transformer_engine: bool = True  # CUDA only; false asks for megatron-core's local layers
    fp8: bool = False  # the decoder's matmuls, in e4m3 forward and e5m2 backward; needs TransformerEngine


@dataclass(kw_only=True)
class RecomputeConfig:
    """`language`: none, selective (core attention) or full. `vision`: recompute each encoder block."""

    language: str = "none"
    vision: bool = False
