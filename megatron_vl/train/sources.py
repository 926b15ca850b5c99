"""The run's data as one value: tokenizer, indexes of all sources that its stages use, image rules."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_vl.config.data import DataConfig
from megatron_vl.config.errors import UserError
from megatron_vl.config.model import ModelConfig
from megatron_vl.config.model_check import image_size, largest_tower, tokens_per_image
from megatron_vl.data.batch import RowRule
from megatron_vl.data.deal import SourceTable
from megatron_vl.data.image_tokens import ImageTokens
from megatron_vl.data.images import ImageRule
from megatron_vl.data.index import SourceIndex
from megatron_vl.data.loader import ContentRule, Loader, LoadingRule, Role, StepPlanner
from megatron_vl.data.source_table import PlannedSource, source_table
from megatron_vl.data.storage.folder import AccessRule
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
        tokens = self.content.image_tokens
        return {
            name: source_table(index, self.modality[name], tokens) for name, index in self.training.items()
        }

    def planned(self, names: Sequence[str]) -> tuple[PlannedSource, ...]:
        """These training sources as another process can open them for planning."""
        tables = self.tables()
        return tuple(
            PlannedSource(
                name=name,
                modality=self.modality[name],
                url=self.training[name].folder.url,
                access=self.training[name].access,
                tokens_per_image=self.content.image_tokens.tokens_per_image,
                digest=tables[name].digest,
            )
            for name in names
        )


def open_sources(
    data: DataConfig, model: ModelConfig, stages: list[StageSettings], check_shards: bool = True
) -> Sources:
    """Open and check what the stages use. One rank of a run lists all shards (`check_shards`); that will do.

    Raises:
        UserError: a source is unknown, missing, changed, or indexed with another tokenizer or template; the
            tokenizer has more entries than the model's vocabulary.
    """
    if not Path(data.tokenizer).exists():
        remedy = f"build it with: {data.build_command}" if data.build_command else "give data.root=DIR"
        raise UserError(f"data={data.name} is not there ({data.tokenizer} does not exist); {remedy}")
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
            access=AccessRule.of(data.access),
            check_shards=check_shards,
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


def build_loader(
    planner: StepPlanner,
    sources: Sources,
    stage: StageSettings,
    role: Role,
    data: DataConfig,
    *,
    pin_memory: bool = False,
) -> Loader:
    """The stage's microbatches for one rank; `pin_memory` for one with a GPU."""
    rows = row_rule(stage)
    reader = IndexedUnits(sources.training, sources.content, rows.sequence_length, role)
    rule = LoadingRule(
        prefetch_steps=data.prefetch_steps,
        num_threads=data.workers,
        refuse_failed=data.on_bad_sample == "refuse",
        pin_memory=pin_memory,
    )
    return Loader(planner, reader, sources.content, rows, role, rule)


def row_rule(stage: StageSettings) -> RowRule:
    """How the stage lays units into rows. Unpacked microbatches are padded to a multiple that sequence
    parallelism can divide and that keeps the number of different shapes small."""
    return RowRule(
        sequence_length=stage.values.sequence_length,
        packing=stage.values.packing,
        micro_batch_size=stage.values.micro_batch_size,
        pad_multiple=16 * stage.topology.tensor_size,
    )
