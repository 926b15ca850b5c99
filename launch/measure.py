"""What training measures: held-out losses, whether the image is used, answers to look at, and benchmarks."""

import json
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_vl.data.loader import ContentRule
from megatron_vl.evaluate.evaluator import Evaluator
from megatron_vl.evaluate.heldout import Scorer
from megatron_vl.evaluate.rows import RowScorer
from megatron_vl.evaluate.samples import answered_samples
from megatron_vl.evaluate.suite import Task, run_suite
from megatron_vl.train.evaluation import Moment
from megatron_vl.train.metrics import BenchmarkScore, HeldoutLoss, ImageUse
from megatron_vl.train.run_dir import RunDirectory, write_atomically
from megatron_vl.train.sources import Sources
from megatron_vl.train.stage import Stage


@dataclass(frozen=True, kw_only=True)
class MeasureHeldout:
    """Scores the held-out part of every source that the stage trains on; at its end, with swapped images too.

    `directory` is where a few of the samples go with the model's answers, on the rank that writes.
    """

    sources: Sources
    max_samples: int  # per source
    directory: RunDirectory | None

    def __call__(self, stage: Stage, moment: Moment) -> list[HeldoutLoss | ImageUse]:
        """Collective over the world."""
        rows = RowScorer(
            chunks=stage.model.chunks,
            groups=stage.model.groups,
            content=self.sources.content,
            sequence_length=stage.settings.values.sequence_length,
        )
        scorer = Scorer(rows=rows, max_samples=self.max_samples)
        name, results = stage.settings.name, list[HeldoutLoss | ImageUse]()
        used = [source for source in stage.settings.values.sources if source in self.sources.heldout]
        for source in used if self.max_samples else []:
            index = self.sources.heldout[source]
            scores = scorer.score(index)
            results.append(
                HeldoutLoss(
                    stage=name,
                    step=moment.step,
                    global_step=moment.global_step,
                    source=source,
                    loss=scores.loss,
                    num_samples=len(scores.sample_losses),
                )
            )
            if moment.ends and self.sources.modality[source] == "multimodal":
                use = scorer.image_use(index, scores)
                if use is not None:
                    results.append(
                        ImageUse(stage=name, global_step=moment.global_step, source=source, **vars(use))
                    )
        if moment.ends and self.max_samples:
            self._show(stage, [source for source in used if self.sources.modality[source] == "multimodal"])
        return results

    def _show(self, stage: Stage, multimodal: list[str]) -> None:
        evaluator = evaluator_of(stage, self.sources.content, stage.settings.values.sequence_length)
        indexes = [self.sources.heldout[source] for source in multimodal]
        samples = answered_samples(indexes, self.sources.content, evaluator)
        if self.directory is not None:
            write_atomically(self.directory.samples, json.dumps(samples))


@dataclass(frozen=True, kw_only=True)
class MeasureBenchmarks:
    """Runs benchmarks with a stage's model."""

    tasks: Sequence[Task]
    content: ContentRule
    sequence_length: int
    max_cached_positions: int

    def __call__(self, stage: Stage, moment: Moment) -> list[BenchmarkScore]:
        """Collective over the world."""
        evaluator = evaluator_of(stage, self.content, self.sequence_length, self.max_cached_positions)
        return [
            BenchmarkScore(
                stage=stage.settings.name,
                step=moment.step,
                global_step=moment.global_step,
                benchmark=result.benchmark,
                method=result.method,
                metric=metric,
                value=value,
                num_items=len(result.records),
            )
            for result in run_suite(self.tasks, evaluator)
            for metric, value in result.metrics.items()
        ]


def evaluator_of(
    stage: Stage, content: ContentRule, sequence_length: int, max_cached_positions: int = 16384
) -> Evaluator:
    """The stage's model, to be asked."""
    return Evaluator(
        chunks=stage.model.chunks,
        groups=stage.model.groups,
        content=content,
        sequence_length=sequence_length,
        max_cached_positions=max_cached_positions,
    )
