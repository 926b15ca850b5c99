"""What each unit of the model costs one rank: FLOPs and moved bytes of the forward, input-gradient and
weight-gradient pass, as functions of a load.

Vision is whole on every tensor-parallel rank; decoder, head and embedding are divided among them.
"""

from collections.abc import Callable
from dataclasses import dataclass

from megatron_vl.config.model import ModelConfig
from megatron_vl.planning import vision_cost
from megatron_vl.planning.work import UnitWork, Work, attention, linear, moved, norm, residual
from megatron_vl.planning.workload import Load

FP32_BYTES = 4


@dataclass(frozen=True, kw_only=True)
class CostModel:
    """The costs of one rank's units.

    `folded_positions`: SAM's relative positions are part of queries and keys, as on CUDA, rather than a bias.
    """

    model: ModelConfig
    tensor_size: int = 1
    sequence_parallel: bool = False
    element_bytes: int = 2
    folded_positions: bool = True

    def unit(self, name: str, load: Load) -> UnitWork:
        """One unit of the name `name` (of UNITS). Raises KeyError for another name."""
        if name in vision_cost.UNITS:
            tower = vision_cost.VisionCost(
                model=self.model, element_bytes=self.element_bytes, folded_positions=self.folded_positions
            )
            return vision_cost.UNITS[name](tower, load.num_images)
        return LANGUAGE_UNITS[name](self, load)

    @property
    def sequence_share(self) -> int:
        """Among how many ranks norms and residuals are divided."""
        return self.tensor_size if self.sequence_parallel else 1


def core_attention(costs: CostModel, load: Load) -> UnitWork:
    """The part of a decoder layer that selective recompute runs again."""
    width = costs.model.language.hidden_size / costs.tensor_size
    return attention(load.num_pairs, width, width)


def decoder_layer(costs: CostModel, load: Load) -> UnitWork:
    language, tokens, size = costs.model.language, load.num_tokens, costs.element_bytes
    hidden, ffn, share = language.hidden_size, language.ffn_hidden_size, costs.tensor_size
    stream_bytes = tokens * hidden * size / costs.sequence_share
    rotary_bytes = 2 * (2 * tokens * hidden * size) / share  # queries and keys, read and written
    gate_bytes = tokens * ffn * size / share
    return (
        linear(tokens, hidden, 3 * hidden / share, size)
        + linear(tokens, hidden / share, hidden, size)
        + linear(tokens, hidden, 2 * ffn / share, size)
        + linear(tokens, ffn / share, hidden, size)
        + core_attention(costs, load)
        + norm(stream_bytes) * 2
        + residual(stream_bytes) * 2
        + moved(rotary_bytes, rotary_bytes)
        + moved(3 * gate_bytes, 5 * gate_bytes)  # silu(gate) * up
    )


def embedding(costs: CostModel, load: Load) -> UnitWork:
    """The look-up, the images' features put into the row, and the row turned round; no matrix product."""
    language = costs.model.language
    row_bytes = load.num_tokens * language.hidden_size * costs.element_bytes
    table_bytes = language.vocab_size * language.hidden_size / costs.tensor_size
    spliced = 3 if load.num_images else 0
    return UnitWork(
        forward=Work(moved_bytes=(4 + spliced) * row_bytes),
        weight_gradient=Work(
            moved_bytes=2 * row_bytes + table_bytes * (2 * costs.element_bytes + 2 * FP32_BYTES)
        ),
    ) + moved(0, 2 * row_bytes)


def final_norm(costs: CostModel, load: Load) -> UnitWork:
    hidden = costs.model.language.hidden_size
    return norm(load.num_tokens * hidden * costs.element_bytes / costs.sequence_share)


def head(costs: CostModel, load: Load) -> UnitWork:
    language = costs.model.language
    outputs = language.vocab_size / costs.tensor_size
    return linear(load.num_tokens, language.hidden_size, outputs, costs.element_bytes)


def loss(costs: CostModel, load: Load) -> UnitWork:
    """Cross-entropy over a rank's share of the vocabulary (`model.vocabulary_loss`): blocks of logits cast to fp32 and
    reduced twice; for the gradient cast again, shifted, exponentiated, scaled, and put in the logits' place."""
    logits = load.num_tokens * costs.model.language.vocab_size / costs.tensor_size
    cast = costs.element_bytes + FP32_BYTES
    return moved(logits * (cast + 2 * FP32_BYTES), logits * (cast + 3 * 2 * FP32_BYTES + cast))


LANGUAGE_UNITS: dict[str, Callable[[CostModel, Load], UnitWork]] = {
    "embedding": embedding,
    "decoder_layer": decoder_layer,
    "core_attention": core_attention,
    "final_norm": final_norm,
    "head": head,
    "loss": loss,
}
UNITS = (*vision_cost.UNITS, *LANGUAGE_UNITS)
