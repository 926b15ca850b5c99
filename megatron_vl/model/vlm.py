"""This rank's part of the vision-language model, one module per pipeline chunk that it holds."""

from dataclasses import dataclass

import torch
from megatron.core.enums import ModelType
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_vl.config.model import ModelConfig
from megatron_vl.model.adaptor import build_adaptor
from megatron_vl.model.decoder import Chunk, Decoder, pack_parameters
from megatron_vl.model.encoders import build_towers, part_of
from megatron_vl.model.stage_zero import StageZero
from megatron_vl.parallel.vision import VisionInput


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """What the configuration of the model does not say. `image_token` is the placeholder's id."""

    image_token: int
    use_transformer_engine: bool = False
    recompute_vision: bool = False
    compile_vision: str | None = None


class VisionLanguageModel(MegatronModule):
    """Stage zero on the first chunk, decoder layers everywhere, head and loss on the last chunk.

    Attributes that megatron-core's schedules and gradient finalising read: pre_process, post_process, vp_stage,
    model_type, share_embeddings_and_output_weights, set_input_tensor().
    """

    share_embeddings_and_output_weights = False
    model_type = ModelType.encoder_or_decoder

    def __init__(
        self,
        config: TransformerConfig,
        model: ModelConfig,
        options: BuildOptions,
        groups: ProcessGroupCollection,
        chunk: Chunk,
    ) -> None:
        super().__init__(config=config)
        self.pre_process, self.post_process, self.vp_stage = chunk.is_first, chunk.is_last, chunk.index
        self.pg_collection = groups
        if chunk.is_first:
            towers = build_towers(model.vision, options.recompute_vision, options.compile_vision)
            adaptor = build_adaptor(model.vision.adaptor, towers.output_widths, config.hidden_size)
            self.stage_zero = StageZero(
                config, model.language.vocab_size, options.image_token, towers, adaptor, groups
            )
        self.language = Decoder(config, model.language, groups, chunk, options.use_transformer_engine)

    def set_input_tensor(self, input_tensor: list[Tensor | None]) -> None:
        self.language.block.set_input_tensor(input_tensor[0])

    def shared_embedding_or_output_weight(self) -> None:
        """The head is not tied to the embedding."""

    def forward(
        self,
        tokens_BS: Tensor | None,
        images: VisionInput,
        labels_BS: Tensor | None,
        cu_seqlens: Tensor,
        max_seqlen: int,
    ) -> Tensor:
        """Run this chunk.

        Returns:
            Losses of all positions [B, S] on the last chunk (logits [S, B, V] where `labels_BS` is None),
            hidden_SBH elsewhere.
        """
        embedded_SBH = self.stage_zero(tokens_BS, images) if self.pre_process else None
        hidden_SBH: Tensor = self.language(embedded_SBH, pack_parameters(cu_seqlens, max_seqlen))
        if not self.post_process:
            return hidden_SBH
        language = self.language
        return (
            language.logits(hidden_SBH) if labels_BS is None else language.token_losses(hidden_SBH, labels_BS)
        )


def model_part(name: str) -> str:
    """The part (one of `config.train.PARTS`) that a parameter of VisionLanguageModel belongs to."""
    if name.startswith("stage_zero."):
        inner = name.removeprefix("stage_zero.")
        return "embedding" if inner.startswith("embedding.") else part_of(inner)
    return "head" if name.startswith("language.head.") else "decoder"


def freeze(chunk: nn.Module, train: list[str]) -> None:
    """Leave gradients on for the parts in `train` alone (paper, Table 4: what a stage trains)."""
    for name, parameter in chunk.named_parameters():
        parameter.requires_grad_(model_part(name) in train)


def build_chunks(
    config: TransformerConfig,
    model: ModelConfig,
    options: BuildOptions,
    groups: ProcessGroupCollection,
    device: torch.device,
) -> list[VisionLanguageModel]:
    """All pipeline chunks of this rank: one, or `virtual_pipeline_model_parallel_size` of them."""
    virtual_size = config.virtual_pipeline_model_parallel_size
    last = (virtual_size or 1) - 1
    chunks = []
    for index in range(virtual_size or 1):
        chunk = Chunk(
            index=None if virtual_size is None else index,
            is_first=index == 0 and groups.pp.rank() == 0,
            is_last=index == last and groups.pp.rank() == groups.pp.size() - 1,
        )
        module = VisionLanguageModel(config, model, options, groups, chunk)
        chunks.append(module.to(device=device, dtype=config.params_dtype))
    return chunks
