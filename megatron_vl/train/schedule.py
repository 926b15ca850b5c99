"""Learning rate as a pure function of the step (paper, Table 4; multi-step: DeepSeek LLM, section 2.3)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """`kind` is cosine, multi_step or constant. Boundaries are fractions of the stage's steps."""

    kind: str
    peak: float
    num_steps: int
    warmup_fraction: float = 0.0
    decay_boundaries: Sequence[float] = ()
    decay_factors: Sequence[float] = ()
    min_ratio: float = 0.0

    @property
    def warmup_steps(self) -> int:
        return round(self.warmup_fraction * self.num_steps)

    def at(self, step: int) -> float:
        """Learning rate of step 1 ... num_steps."""
        if step <= self.warmup_steps:
            return self.peak * step / self.warmup_steps
        if self.kind == "cosine":
            progress = (step - self.warmup_steps) / max(1, self.num_steps - self.warmup_steps)
            cosine = 0.5 * (1 + math.cos(math.pi * progress))
            return self.peak * (self.min_ratio + (1 - self.min_ratio) * cosine)
        if self.kind == "multi_step":
            return self.peak * self._decay(step)
        return self.peak

    def _decay(self, step: int) -> float:
        factor = 1.0
        for boundary, value in zip(self.decay_boundaries, self.decay_factors, strict=True):
            if step > boundary * self.num_steps:
                factor = value
        return factor
