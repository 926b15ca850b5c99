"""The run's data as one value: tokenizer, indexes of all sources that its stages use, image rules."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_vl.config.data import DataConfig
from megatron_vl.config.errors import UserError
from megatron_vl.config.model import ModelConfig
from megatron_vl.config.model_check import image_size, largest_tower, tokens_per_image
from megatron_vl.data.batch import RowRule
from megatron_vl.data.deal import SourceTable
from megatron_vl.data.images import ImageRule, ImageTokens
from megatron_vl.data.index import SourceIndex
from megatron_vl.data.loader import ContentRule, Loader, Role
from megatron_vl.data.plan import Planner, PlanSettings, choose_lanes
from megatron_vl.data.text import TextRule
from megatron_vl.data.units import IndexedUnits
from megatron_vl.train.settings import StageSettings


@dataclass(frozen=True, kw_only=True)
class Sources:
    """Training and held-out indexes by source name, and how their bytes become tokens and pixels."""

    training: dict[str, SourceIndex]
    heldout: dict[str, SourceIndex]
    modality: dict[str, str]
    content: ContentRule

    def tables(self) -> dict[str, SourceTable]:
        """What planning needs to know of each training source."""
        return {
            name: SourceTable(
                name=name,
                modality=self.modality[name],
                num_tokens=index.num_positions(self.content.image_tokens),
                num_images=index.num_images,
                shard_starts=np.append(index.shard_starts, index.num_samples),
                digest=f"{index.digest}:{self.content.image_tokens.tokens_per_image}",
            )
            for name, index in self.training.items()
        }


def open_sources(data: DataConfig, model: ModelConfig, stages: list[StageSettings]) -> Sources:
    """Open and check what the stages use.

    Raises:
        UserError: a source is unknown, missing, changed, or indexed with another tokenizer or template; the
            tokenizer has more entries than the model's vocabulary.
    """
    if data.build_command and not Path(data.tokenizer).exists():
        raise UserError(
            f"data={data.name} is not there ({data.tokenizer} does not exist); build it with: {data.build_command}"
        )
    text = text_rule(data, model)
    used = {name: stage for stage in stages for name, weight in stage.values.sources.items() if weight > 0}
    for name, stage in used.items():
        if name not in data.sources:
            raise UserError(
                f"stage.{stage.name}.sources names {name}, which data={data.name} lacks; "
                f"it has {', '.join(sorted(data.sources))}"
            )

    def open_index(name: str, path: str) -> SourceIndex:
        return SourceIndex.open(
            path,
            text,
            name=name,
            max_image_pixels=data.max_image_pixels,
            build_command=data.build_command,
        )

    heldout = {name: data.sources[name].heldout for name in used}
    return Sources(
        training={name: open_index(name, data.sources[name].path) for name in used},
        heldout={name: open_index(name, path) for name, path in heldout.items() if path is not None},
        modality={name: data.sources[name].modality for name in used},
        content=content_rule(text, model, data),
    )


def text_rule(data: DataConfig, model: ModelConfig) -> TextRule:
    """The configured tokenizer and chat template.

    Raises:
        UserError: the tokenizer is broken, or has more entries than the model's vocabulary.
    """
    text = TextRule(
        data.tokenizer,
        bos_token=data.bos_token,
        eos_token=data.eos_token,
        image_token=data.image_token,
        chat_template=data.chat_template,
    )
    if text.vocab_size > model.language.vocab_size:
        raise UserError(
            f"data.tokenizer={data.tokenizer} has {text.vocab_size} entries, more than "
            f"model.language.vocab_size={model.language.vocab_size}; raise it to at least {text.vocab_size}"
        )
    return text


def content_rule(text: TextRule, model: ModelConfig, data: DataConfig) -> ContentRule:
    """How bytes become what this model takes. Raises UserError where `data` names no known rounding."""
    red, green, blue = largest_tower(model).mean
    return ContentRule(
        text=text,
        image=ImageRule(
            size=image_size(model),
            mean=(red, green, blue),
            max_pixels=data.max_image_pixels,
            rounding=data.image_rounding,
        ),
        image_tokens=ImageTokens(tokens_per_image=tokens_per_image(model)),
        max_sample_bytes=data.max_sample_bytes,
    )


def build_planner(
    sources: Sources, stage: StageSettings, data: DataConfig, seed: int, data_rank: int
) -> Planner:
    """The stage's plan for one data-parallel rank."""
    values = stage.values
    settings = PlanSettings(
        stage=stage.name,
        seed=seed,
        num_steps=values.steps,
        text_ratio=values.text_ratio,
        text_warmup_fraction=values.text_warmup_fraction,
        sources=values.sources,
        global_batch_size=values.global_batch_size,
        sequence_length=values.sequence_length,
        packing=values.packing,
        lanes=choose_lanes(data.lanes, values.global_batch_size),
        shuffle_window=data.shuffle_window,
        packing_window=data.packing_window,
        max_carry_steps=data.max_carry_steps,
        max_images_per_pack=data.max_images_per_pack,
    )
    return Planner(sources.tables(), settings, data_rank, stage.topology.data_size)


def build_loader(
    planner: Planner, sources: Sources, stage: StageSettings, role: Role, data: DataConfig
) -> Loader:
    """The stage's microbatches for one rank."""
    rows = row_rule(stage)
    reader = IndexedUnits(sources.training, sources.content, rows.sequence_length, role)
    return Loader(planner, reader, sources.content, rows, role, prefetch_steps=data.prefetch_steps)


def row_rule(stage: StageSettings) -> RowRule:
    """How the stage lays units into rows. Unpacked microbatches are padded to a multiple that sequence
    parallelism can divide and that keeps the number of different shapes small."""
    return RowRule(
        sequence_length=stage.values.sequence_length,
        packing=stage.values.packing,
        micro_batch_size=stage.values.micro_batch_size,
        pad_multiple=16 * stage.topology.tensor_size,
    )
