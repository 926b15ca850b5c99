"""The grid of ranks: tensor x pipeline x data parallel, checked against world size, model and batch."""

from dataclasses import dataclass

from megatron_vl.config.errors import UserError
from megatron_vl.config.model import LanguageConfig


@dataclass(frozen=True, kw_only=True)
class Topology:
    """Sizes of one stage's parallel grid; `data_size` is what world_size leaves.

    Raises:
        UserError: tensor_size * pipeline_size does not divide world_size.
    """

    world_size: int
    tensor_size: int = 1
    pipeline_size: int = 1
    virtual_size: int = 1

    def __post_init__(self) -> None:
        for field in ("tensor_size", "pipeline_size", "virtual_size"):
            if getattr(self, field) < 1:
                raise UserError(f"parallel.{field}={getattr(self, field)}: must be at least 1")
        if self.world_size % self.model_size:
            raise UserError(
                f"parallel.tensor_size={self.tensor_size} x parallel.pipeline_size={self.pipeline_size} = "
                f"{self.model_size} ranks do not divide the {self.world_size} ranks of this run; "
                f"start a multiple of {self.model_size} (run.num_processes, or the launcher's task count)"
            )
        if self.virtual_size > 1 and self.pipeline_size == 1:
            raise UserError(
                f"parallel.virtual_size={self.virtual_size} needs parallel.pipeline_size of at least 2, "
                f"which is {self.pipeline_size}"
            )

    @property
    def model_size(self) -> int:
        return self.tensor_size * self.pipeline_size

    @property
    def data_size(self) -> int:
        return self.world_size // self.model_size

    @property
    def num_chunks(self) -> int:
        """Pipeline stages, virtual ones included."""
        return self.pipeline_size * self.virtual_size


def check_tensor_size(language: LanguageConfig, tensor_size: int, sequence_parallel: bool) -> None:
    """Raise UserError unless heads, ffn, vocabulary and hidden size divide by `tensor_size`."""
    for field in ("num_heads", "ffn_hidden_size", "vocab_size", "hidden_size"):
        value = getattr(language, field)
        if value % tensor_size:
            raise UserError(
                f"parallel.tensor_size={tensor_size} does not divide model.language.{field}={value}; "
                f"valid here: {_divisors(language)}"
            )
    if sequence_parallel and tensor_size == 1:
        raise UserError(
            "parallel.sequence_parallel=true needs parallel.tensor_size of at least 2, which is 1"
        )


def _divisors(language: LanguageConfig) -> str:
    values = (language.num_heads, language.ffn_hidden_size, language.vocab_size, language.hidden_size)
    return ", ".join(str(n) for n in range(1, min(values) + 1) if not any(value % n for value in values))


def check_batch_sizes(
    global_batch_size: int, micro_batch_size: int, topology: Topology, stage_name: str
) -> None:
    """Check that a global batch divides into microbatches for every data-parallel rank.

    Raises:
        UserError: the sizes do not divide, or there are too few microbatches to interleave.
    """
    for field, value in (("global", global_batch_size), ("micro", micro_batch_size)):
        if value < 1:
            raise UserError(f"train.{field}_batch_size={value} in stage {stage_name}: must be at least 1")
    per_slot = micro_batch_size * topology.data_size
    if global_batch_size % per_slot:
        raise UserError(
            f"train.global_batch_size={global_batch_size} in stage {stage_name} is not a multiple of "
            f"micro_batch_size x data-parallel size = {micro_batch_size} x {topology.data_size} = {per_slot}; "
            f"nearest: {max(1, global_batch_size // per_slot) * per_slot}"
        )
    count = global_batch_size // per_slot
    if topology.virtual_size > 1 and count < topology.pipeline_size:
        raise UserError(
            f"stage {stage_name}: {count} microbatches per data-parallel rank, but parallel.virtual_size="
            f"{topology.virtual_size} needs at least parallel.pipeline_size={topology.pipeline_size}; "
            f"change train.global_batch_size={global_batch_size} or train.micro_batch_size={micro_batch_size}"
        )
