"""How long the steps of a stage take under one setting, for any splits of the decoder's layers, many at once.

Layers are alike, so a chunk's seconds and parameters are a constant, so much for each layer, and what stage zero and
the head add. Splits are arrays [num_chunks, B]: how many layers each chunk has, in B cases.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from megatron_vl.config.cluster import ClusterConfig
from megatron_vl.config.model import ModelConfig
from megatron_vl.planning.calibration import ELEMENT_BYTES
from megatron_vl.planning.chunk_times import ChunkTimes
from megatron_vl.planning.communication import send_seconds
from megatron_vl.planning.cost import CostModel
from megatron_vl.planning.schedule import Schedule
from megatron_vl.planning.setting import Setting
from megatron_vl.planning.simulate import Array, Replay, replay
from megatron_vl.planning.step_times import StepTimes
from megatron_vl.planning.timing import Timing
from megatron_vl.planning.workload import Load, Workload

Split = NDArray[np.int64]
TEXT, MULTIMODAL = "text", "multimodal"


@dataclass(frozen=True, kw_only=True)
class StepKind:
    """`share` of the stage's steps; `num_images` in each microbatch on average."""

    name: str
    share: float
    num_images: float


@dataclass(frozen=True, kw_only=True)
class Affine:
    """What a chunk costs, by its layers: `fixed` for any chunk, and what stage zero and the head add. Each an
    array [...], of figures in a row or none."""

    fixed: Array
    layer: Array
    first: Array
    last: Array

    @classmethod
    def of(cls, cost: Callable[[str], float | Sequence[float]]) -> "Affine":

        one, two, first, last = (np.array(cost(chunk), dtype=np.float64) for chunk in ("t", "tt", "E", "L"))
        fixed = 2 * one - two
        return cls(fixed=fixed, layer=two - one, first=first - fixed, last=last - fixed)

    def at(self, split: Split) -> Array:
        """[num_chunks, B] to [..., num_chunks, B]."""
        values: Array = self.fixed[..., None, None] + self.layer[..., None, None] * split
        values[..., 0, :] += self.first[..., None]
        values[..., -1, :] += self.last[..., None]
        return values


@dataclass(frozen=True, kw_only=True)
class StepReplay:
    """B cases of a step. The pipeline's clock begins when what is encoded ahead of it has been."""

    pipeline: Replay
    encoding: Array  # [2, B]: seconds ahead of the pipeline, and behind it
    vision: Array  # [num_microbatches, B]: seconds that images take of a forward pass through the first chunk
    seconds: Array  # [B], all in


@dataclass(frozen=True, kw_only=True)
class Steps:
    """One replica's steps. The setting's layout is not looked at: splits take its place."""

    model: ModelConfig
    workload: Workload
    setting: Setting
    cluster: ClusterConfig
    timing: Timing  # of a rank at the setting's tensor_size
    precision: str = "bf16"

    @cached_property
    def schedule(self) -> Schedule:
        """Raises UserError for microbatches that cannot be interleaved."""
        topology = self.setting.topology
        return Schedule(
            pipeline_size=topology.pipeline_size,
            virtual_size=topology.virtual_size,
            num_microbatches=self.workload.global_batch_size
            // (topology.data_size * self.setting.micro_batch_size),
        )

    @cached_property
    def kinds(self) -> list[StepKind]:
        text = self.workload.text_ratio
        images = self.workload.images_per_row * self.setting.micro_batch_size
        kinds = [
            StepKind(name=TEXT, share=text, num_images=0.0),
            StepKind(name=MULTIMODAL, share=1 - text, num_images=images),
        ]
        return [kind for kind in kinds if kind.share > 0]

    def mean_seconds(self, splits: Split) -> Array:
        """Of the mixture of text and multimodal steps, all microbatches of a step alike: [B]."""
        mean = np.zeros(splits.shape[1])
        for kind in self.kinds:
            mean += kind.share * self.of_kind(kind, splits).seconds
        return mean

    def of_kind(self, kind: StepKind, splits: Split) -> StepReplay:
        """A step whose microbatches are all alike."""
        shape = (self.schedule.num_microbatches, splits.shape[1])
        return self.replay(np.full(shape, kind.num_images), splits)

    def replay(self, num_images: Array, splits: Split) -> StepReplay:
        """Steps whose microbatches have `num_images` [num_microbatches, B] images, with a split for each case: as one
        replica would take them alone. All replicas take as long as the slowest."""
        passes = np.repeat(self._text_seconds.at(splits)[:, :, None], self.schedule.num_microbatches, axis=2)
        counts, places = np.unique(num_images, return_inverse=True)
        vision = np.stack([self._vision_seconds(float(count)) for count in counts], axis=1)
        vision = vision[:, places.reshape(num_images.shape)]  # [2, M, B]
        passes[:, 0] += vision
        totals, places = np.unique(num_images.sum(0), return_inverse=True)
        encoding = np.stack([self._encoding(float(total)) for total in totals], axis=1)[:, places]
        pipeline = replay(self.schedule, passes, self._message_seconds, self._gathered(splits, encoding[0]))
        end = self._reduced(splits, pipeline).max(0) + self._update_seconds(splits)
        return StepReplay(
            pipeline=pipeline, encoding=encoding, vision=vision[0], seconds=encoding.sum(0) + end
        )

    def busy(self, kind: StepKind) -> Affine:
        """Seconds that a chunk's passes take of a rank in a step: numbers."""
        count = self.schedule.num_microbatches
        text, vision = self._text_seconds, self._vision_seconds(kind.num_images).sum()
        return Affine(
            fixed=text.fixed.sum() * count,
            layer=text.layer.sum() * count,
            first=(text.first.sum() + vision) * count,
            last=text.last.sum() * count,
        )

    def least_besides(self, kind: StepKind) -> float:
        """A lower bound of what comes on top of the busiest rank's passes."""
        encoding = self._encoding(kind.num_images * self.schedule.num_microbatches)
        return float(encoding.sum()) + self._besides.optimizer_seconds([])

    def _gathered(self, splits: Split, encoding: Array) -> Array:
        """When each chunk's parameters are there, since the pipeline began: gathers run beside encoding."""
        ends = np.zeros(splits.shape)
        pipeline_size = self.schedule.pipeline_size
        gathers = self._gather_seconds.at(splits)
        for rank in range(pipeline_size):
            ends[rank::pipeline_size] = gathers[rank::pipeline_size].cumsum(0)
        remaining: Array = np.maximum(ends - encoding, 0.0)
        return remaining

    def _reduced(self, splits: Split, pipeline: Replay) -> Array:
        """When each rank has reduced its gradients: [pipeline_size, B]. A chunk's follow its last backward pass."""
        size = self.schedule.pipeline_size
        computed = pipeline.ends[1].max(1)  # [num_chunks, B]
        seconds = self._reduce_seconds.at(splits)
        done = np.zeros((size, splits.shape[1]))
        for chunk in reversed(range(self.schedule.num_chunks)):
            rank = chunk % size
            done[rank] = np.maximum(done[rank], computed[chunk]) + seconds[chunk]
        return done

    def _update_seconds(self, splits: Split) -> Array:
        """Of the optimizer on the rank with most parameters, once all have agreed to step: [B]."""
        size = self.schedule.pipeline_size
        values = self._optimizer_seconds.at(splits)
        by_rank = np.stack([values[rank::size].sum(0) for rank in range(size)])
        longest: Array = by_rank.max(0) + self._besides.optimizer_seconds([])
        return longest

    @cached_property
    def _text_seconds(self) -> Affine:
        """[2] for each chunk: forward and backward pass over a microbatch without images."""
        load = self._load(0.0)
        return Affine.of(lambda chunk: self._passes(chunk, load))

    def _vision_seconds(self, num_images: float) -> Array:
        """[2]: what images add to a forward and backward pass over the first chunk."""
        with_images = np.array(self._passes("E", self._load(num_images)))
        added: Array = with_images - self._passes("E", self._load(0.0))
        return added

    def _passes(self, chunk: str, load: Load) -> tuple[float, float]:
        seconds = self._chunk_times.chunk(chunk, load)
        return seconds.forward, seconds.backward

    def _encoding(self, num_images: float) -> Array:
        seconds = self._chunk_times.encode(num_images)
        return np.array([seconds.forward, seconds.backward])

    def _load(self, num_images: float) -> Load:
        return self.workload.load(self.setting.micro_batch_size, num_images)

    @cached_property
    def _reduce_seconds(self) -> Affine:
        return Affine.of(self._besides.reduce_seconds)

    @cached_property
    def _gather_seconds(self) -> Affine:
        return Affine.of(self._besides.gather_seconds)

    @cached_property
    def _optimizer_seconds(self) -> Affine:
        """Without what any step takes."""
        nothing = self._besides.optimizer_seconds([])
        return Affine.of(lambda chunk: self._besides.optimizer_seconds([chunk]) - nothing)

    @cached_property
    def _message_seconds(self) -> float:
        costs = CostModel(
            model=self.model,
            tensor_size=self.setting.topology.tensor_size,
            sequence_parallel=self.setting.sequence_parallel,
            element_bytes=ELEMENT_BYTES[self.precision],
        )
        return send_seconds(self._load(0.0), costs, self.cluster, self.setting.topology)

    @cached_property
    def _chunk_times(self) -> ChunkTimes:
        return ChunkTimes(
            model=self.model,
            trained=self.workload.trained,
            setting=self.setting,
            timing=self.timing,
            cluster=self.cluster,
            element_bytes=ELEMENT_BYTES[self.precision],
        )

    @cached_property
    def _besides(self) -> StepTimes:
        return StepTimes(
            model=self.model,
            trained=self.workload.trained,
            topology=self.setting.topology,
            cluster=self.cluster,
            timing=self.timing,
            element_bytes=ELEMENT_BYTES[self.precision],
        )
