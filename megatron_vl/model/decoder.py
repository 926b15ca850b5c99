"""The language model over megatron-core's transformer layers: RoPE, the layers of this pipeline chunk, head.

Shapes: S tokens of the microbatch (S/TP under sequence parallelism), H hidden size, V vocabulary.
"""

from dataclasses import dataclass

import torch
from megatron.core import tensor_parallel
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlock,
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_vl.config.model import LanguageConfig
from megatron_vl.model.attention import PackedAttention, RMSNorm
from megatron_vl.model.vocabulary_loss import vocabulary_loss


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """Which pipeline chunk a module belongs to. `index` is the virtual stage on this rank, None without VPP."""

    index: int | None
    is_first: bool
    is_last: bool


class Decoder(MegatronModule):
    """The decoder layers of one pipeline chunk; on the last chunk also the final norm and the untied head."""

    def __init__(
        self,
        config: TransformerConfig,
        language: LanguageConfig,
        groups: ProcessGroupCollection,
        chunk: Chunk,
        use_transformer_engine: bool,
    ) -> None:
        super().__init__(config=config)
        self.rotary = RotaryEmbedding(
            kv_channels=config.kv_channels,
            rotary_percent=1.0,
            rotary_base=language.rope_theta,
            use_cpu_initialization=config.use_cpu_initialization,
            cp_group=groups.cp,
        )
        self.block = TransformerBlock(
            config=config,
            spec=_block_spec(config, use_transformer_engine, chunk, groups.pp.rank()),
            pre_process=chunk.is_first,
            post_process=chunk.is_last,
            pg_collection=groups,
            vp_stage=chunk.index,
        )
        self.groups = groups
        if chunk.is_last:
            self.head = tensor_parallel.ColumnParallelLinear(
                config.hidden_size,
                language.vocab_size,
                config=config,
                init_method=config.init_method,
                bias=False,
                gather_output=False,
                tp_group=groups.tp,
            )

    def forward(self, hidden_SBH: Tensor | None, packed: PackedSeqParams) -> Tensor:
        """Run this chunk's layers. `hidden_SBH` is None where the schedule has set the block's input tensor."""
        rotary = self.rotary(packed.max_seqlen_q, packed_seq=True)
        out: Tensor = self.block(
            hidden_states=hidden_SBH,
            attention_mask=None,
            rotary_pos_emb=rotary,
            packed_seq_params=packed,
        )
        return out

    def token_losses(self, hidden_SBH: Tensor, labels_BS: Tensor) -> Tensor:
        """Cross-entropy of every position, [B, S] in fp32. Only on the last chunk."""
        logits_SBV, _ = self.head(hidden_SBH)
        labels_SB = labels_BS.transpose(0, 1)
        losses = vocabulary_loss(logits_SBV.flatten(0, 1), labels_SB.flatten(), self.groups.tp)
        return losses.view_as(labels_SB).transpose(0, 1)

    def logits(self, hidden_SBH: Tensor) -> Tensor:
        """Logits over the whole vocabulary, [S, B, V], on every tensor-parallel rank. Only on the last chunk."""
        logits_SBV, _ = self.head(hidden_SBH)
        whole_SBV: Tensor = tensor_parallel.gather_from_tensor_model_parallel_region(
            logits_SBV, group=self.groups.tp
        )
        return whole_SBV


def _block_spec(
    config: TransformerConfig, use_transformer_engine: bool, chunk: Chunk, pipeline_rank: int
) -> TransformerBlockSubmodules:
    """Layer specs of one chunk: TransformerEngine's, or megatron-core's local layers with our attention."""
    layer: ModuleSpec
    if use_transformer_engine:
        from megatron.core.extensions.transformer_engine import TENorm as FinalNorm

        layer = get_gpt_layer_with_transformer_engine_spec()
    else:
        FinalNorm = RMSNorm
        layer = get_gpt_layer_local_spec(normalization="RMSNorm")
        layer.submodules.input_layernorm = RMSNorm
        layer.submodules.pre_mlp_layernorm = RMSNorm
        layer.submodules.self_attention.submodules.core_attention = PackedAttention
    num_layers = get_num_layers_to_build(config, vp_stage=chunk.index, pp_rank=pipeline_rank)
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=FinalNorm)


def pack_parameters(cu_seqlens: Tensor, max_seqlen: int) -> PackedSeqParams:
    """What megatron-core's layers need to keep positions and attention within segments.

    `max_seqlen` must be the longest segment: a larger value equal to the row's length makes megatron-core read
    RoPE positions along the row instead.
    """
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=max_seqlen,
        max_seqlen_kv=max_seqlen,
    )


def set_requires_input_gradient(hidden: Tensor) -> Tensor:
    """Make `hidden` part of the autograd graph: recomputed layers lose their gradients below a frozen input."""
    return hidden if hidden.requires_grad or not torch.is_grad_enabled() else hidden.requires_grad_()
