"""megatron-core's TransformerConfig for our decoder: the one place that sets its many switches."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn import functional

from megatron_vl.config.errors import UserError
from megatron_vl.config.model import LanguageConfig
from megatron_vl.config.parallel import RecomputeConfig
from megatron_vl.planning.topology import Topology


@dataclass(frozen=True, kw_only=True)
class Division:
    """How the decoder is divided. `layout` has been checked against the topology and the layers."""

    topology: Topology
    layout: str
    sequence_parallel: bool = False


def transformer_config(
    language: LanguageConfig,
    division: Division,
    recompute: RecomputeConfig,
    precision: str,
    *,
    on_cuda: bool = False,
    use_transformer_engine: bool = False,
    fp8: bool = False,
) -> TransformerConfig:
    """The decoder's configuration. Weights are left uninitialised: `initialize` or a checkpoint fills them.

    Raises:
        UserError: `fp8` without TransformerEngine.
    """
    if fp8 and not use_transformer_engine:
        raise UserError("parallel.fp8=true: needs CUDA and parallel.transformer_engine=true")
    topology = division.topology
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    interleaved = topology.virtual_size > 1
    return TransformerConfig(
        num_layers=language.num_layers,
        hidden_size=language.hidden_size,
        num_attention_heads=language.num_heads,
        ffn_hidden_size=language.ffn_hidden_size,
        normalization="RMSNorm",
        layernorm_epsilon=language.norm_epsilon,
        gated_linear_unit=True,
        activation_func=functional.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        softmax_scale=1.0 / math.sqrt(language.hidden_size // language.num_heads),
        **dict.fromkeys(("init_method", "output_layer_init_method", "embedding_init_method"), _leave),
        tensor_model_parallel_size=topology.tensor_size,
        pipeline_model_parallel_size=topology.pipeline_size,
        virtual_pipeline_model_parallel_size=topology.virtual_size if interleaved else None,
        pipeline_model_parallel_layout=division.layout if topology.pipeline_size > 1 else None,
        sequence_parallel=division.sequence_parallel,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=precision == "bf16",
        fp8="hybrid" if fp8 else None,
        calculate_per_token_loss=True,
        # With two pipeline ranks both neighbours are the same peer, and batched point-to-point pairs its
        # messages wrongly; on gloo a buffer must outlive its send.
        overlap_p2p_comm=interleaved,
        batch_p2p_comm=not interleaved,
        deallocate_pipeline_outputs=on_cuda,
        bias_activation_fusion=True,
        # Fusions are CUDA kernels, or compile for many seconds on CPU.
        bias_dropout_fusion=on_cuda,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        apply_rope_fusion=True,  # the unfused form reads segment lengths back from the device
        **_recompute(recompute),
        cuda_graph_scope=[],  # none; its default warns
        hetereogenous_dist_checkpoint=True,  # one checkpoint entry per layer, whatever the layout
    )


def _recompute(recompute: RecomputeConfig) -> dict[str, Any]:
    granularity = None if recompute.language == "none" else recompute.language
    if granularity != "full":
        return {"recompute_granularity": granularity}
    return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}


def _leave(weight: Tensor) -> Tensor:
    return weight
