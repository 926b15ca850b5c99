"""When a model is measured during training, and by what."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron_vl.train.metrics import BenchmarkScore, HeldoutLoss, ImageUse
from megatron_vl.train.stage import Stage


@dataclass(frozen=True, kw_only=True)
class Moment:
    """When a model is measured: after `step` of its stage (0: at the start); `ends`: it is the stage's last."""

    step: int
    global_step: int
    ends: bool


Measure = Callable[[Stage, Moment], Sequence[HeldoutLoss | ImageUse | BenchmarkScore]]


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Measures a stage's model at the stage's end, every `every` steps (0: not) and, if wanted, at its start."""

    measure: Measure
    every: int
    at_start: bool

    def is_due(self, moment: Moment) -> bool:
        if moment.step == 0:
            return self.at_start
        return moment.ends or (self.every > 0 and moment.step % self.every == 0)
