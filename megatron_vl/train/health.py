"""Which steps count: losses seen so far, steps skipped in a row, data given up. Every rank comes to the same."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

from megatron_vl.config.faults import FaultsConfig

DEVIATION = 1.4826  # of a normal distribution, by its median absolute deviation
SMALLEST_SPREAD = 0.01  # of the median: losses that hardly differ are no reason for alarm


@dataclass(kw_only=True)
class Health:
    """A stage's. Part of its checkpoints, so that a resume skips what the uninterrupted run would have.

    `losses` are those of late, by modality, of steps that counted; `skipped` the last steps, as far as none of them
    did; `given_up` those that are passed over, since the run went back for their data.
    """

    losses: dict[str, list[float]] = field(default_factory=dict)
    skipped: list[int] = field(default_factory=list)
    given_up: list[int] = field(default_factory=list)

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> "Health":
        """The inverse of `to_json`; empty for a stage that begins."""
        return cls(**saved)

    def to_json(self) -> dict[str, Any]:
        """Plain lists and dicts; floats keep every bit in JSON."""
        return asdict(self)

    def max_loss(self, modality: str, faults: FaultsConfig) -> float:
        """Above it a loss is a spike; infinite while too few are known."""
        known = self.losses.get(modality, [])
        if faults.spike_deviations is None or len(known) < faults.spike_window / 4:
            return math.inf
        middle = median(known)
        spread = max(DEVIATION * median(abs(loss - middle) for loss in known), SMALLEST_SPREAD * middle)
        return max(middle + faults.spike_deviations * spread, *known)

    def count(self, step: int, modality: str, loss: float, skipped: bool, faults: FaultsConfig) -> None:
        """What became of a step."""
        if skipped:
            self.skipped.append(step)
            return
        self.skipped.clear()
        known = self.losses.setdefault(modality, [])
        known.append(loss)
        del known[: -faults.spike_window]


def steps_to_give_up(skipped: list[int], given_up: list[int], num_before: int, first: int) -> list[int]:
    """The steps skipped in a row and, going back from them, `num_before` more that are not given up yet; none before
    `first`. Where the weights came to a bad place before the losses showed it, other data must lead elsewhere."""
    before = [step for step in range(first, skipped[0]) if step not in given_up]
    return [*before[len(before) - min(num_before, len(before)) :], *skipped]
