"""Which modality a step trains, and which source a lane draws from next; both by error diffusion in integers.

Ratios are counted in millionths, so that no rounding of floats can make two machines disagree.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

from megatron_vl.config.errors import UserError
from megatron_vl.data.types import MULTIMODAL, TEXT

MILLION = 1_000_000


@dataclass(frozen=True)
class TextSchedule:
    """The scheduled share of text-only global batches: over the warm-up it falls linearly from 1 to `final`.

    Source: the DeepSeek-VL paper, "Modality Warmup".
    """

    final: int  # millionths
    warmup_steps: int

    @classmethod
    def of_stage(
        cls, stage: str, num_steps: int, text_ratio: float, warmup_fraction: float
    ) -> "TextSchedule":
        """The schedule of stage `stage`. Raises UserError where a value is not between 0 and 1."""
        for name, value in (("text_ratio", text_ratio), ("text_warmup_fraction", warmup_fraction)):
            if not 0 <= value <= 1:
                raise UserError(f"stage.{stage}.{name} is {value}; it must lie between 0 and 1")
        return cls(
            final=round(Fraction(text_ratio) * MILLION),
            warmup_steps=round(Fraction(warmup_fraction) * num_steps),
        )

    def at(self, step: int) -> int:
        """Millionths at `step` (from 1): all text at the first step of a warm-up, final after its last."""
        if step > self.warmup_steps:
            return self.final
        return MILLION - (MILLION - self.final) * (step - 1) // self.warmup_steps

    def modalities(self, num_steps: int) -> tuple[str, ...]:
        """The modalities that a stage of `num_steps` steps is scheduled to train."""
        text = (TEXT,) if self.at(1) > 0 else ()
        return (*text, MULTIMODAL) if self.at(num_steps) < MILLION else text


def next_text_rows(deficit: int, text_share: int, num_rows: int, quantum: int) -> tuple[int, int]:
    """How many of a lane's `num_rows` rows are text in a step scheduled at `text_share` millionths, and the deficit.

    A multiple of `quantum`, which divides `num_rows`: with all rows as the quantum, a step has one modality.
    `deficit` is the text owed so far, in millionths of a row: scheduled minus given. It starts at 0 and stays within
    half a quantum, so the cumulative ratio never strays a whole one from its schedule.
    """
    deficit += text_share * num_rows
    size = quantum * MILLION
    num_text = min(max((2 * deficit + size) // (2 * size), 0) * quantum, num_rows)
    return num_text, deficit - num_text * MILLION


def sample_weights(weights: Mapping[str, float]) -> dict[str, int]:
    """Weights as integers, in the order of names, from `weights` of any scale."""
    total = sum((Fraction(weight) for weight in weights.values()), Fraction(0))
    return {name: max(1, round(Fraction(weights[name]) / total * MILLION)) for name in sorted(weights)}


def pick_source(credits: Mapping[str, int], weights: Mapping[str, int]) -> str:
    """The source most in arrears of its weight; the first of equals."""
    return max(weights, key=lambda name: credits[name] + weights[name] * MILLION)


def book_draw(
    credits: dict[str, int], weights: Mapping[str, int], chosen: str, num_pieces: int, sign: int = 1
) -> None:
    """Book the draw of a unit from `chosen` in `credits`, or take that back (`sign` -1).

    Weights are by samples: one of `num_pieces` pieces of a document is that part of a draw.
    """
    part = sign * (MILLION // num_pieces)
    for name, weight in weights.items():
        credits[name] += weight * part
    credits[chosen] -= sum(weights.values()) * part
