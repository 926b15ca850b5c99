"""Seconds of a pipeline chunk's forward and backward pass over one microbatch, and of encoding before the pipeline.

Vision placement: *replicated*, every tensor-parallel rank of stage zero encodes all images of the microbatch; *split*,
each encodes its share and gathers the adaptor's output; *spread*, all ranks of a replica encode their share of the
step's images before the pipeline begins, and the first stage gathers the towers' features: only the adaptor stays.
"""

import math
from dataclasses import dataclass, replace

from megatron_vl.config.cluster import ClusterConfig
from megatron_vl.config.model import ModelConfig
from megatron_vl.planning.passes import adaptor_units, chunk_units, encoder_units, passes
from megatron_vl.planning.recompute import computed_again
from megatron_vl.planning.setting import Setting
from megatron_vl.planning.timing import Timing
from megatron_vl.planning.vision_communication import VisionMessages
from megatron_vl.planning.workload import Load


@dataclass(frozen=True, kw_only=True)
class ChunkSeconds:
    forward: float = 0.0
    backward: float = 0.0

    def __add__(self, other: "ChunkSeconds") -> "ChunkSeconds":
        return ChunkSeconds(forward=self.forward + other.forward, backward=self.backward + other.backward)

    def __mul__(self, times: float) -> "ChunkSeconds":
        return ChunkSeconds(forward=times * self.forward, backward=times * self.backward)


@dataclass(frozen=True, kw_only=True)
class ChunkTimes:
    """How long one rank takes, for one model, stage and setting. `trained`: parts of config.train.PARTS."""

    model: ModelConfig
    trained: frozenset[str]
    setting: Setting
    timing: Timing
    cluster: ClusterConfig
    element_bytes: int = 2

    def chunk(self, chunk: str, load: Load) -> ChunkSeconds:
        """Of a chunk, given as its E, t and L. The load's images are all of the microbatch's."""
        fixed = self.cluster.chunk_seconds
        total = ChunkSeconds(forward=fixed, backward=fixed)
        for name, count in chunk_units(chunk, self.model).items():
            if name not in self._encoders or self.setting.vision_placement != "spread":
                total += self._unit(name, self._own_images(name, load)) * count
        if "E" in chunk and self.setting.vision_placement == "split":
            gather = self._messages.gather_adapted_seconds(load.num_images)
            total += ChunkSeconds(forward=gather, backward=gather)
        return total

    def encode(self, num_images: float) -> ChunkSeconds:
        """Under *spread*, of a replica's `num_images` of a step, by all its ranks: before the pipeline's first forward
        pass and after its last backward pass. Towers that train encode once more for theirs."""
        if not num_images or self.setting.vision_placement != "spread":
            return ChunkSeconds()
        share = math.ceil(num_images / self.setting.topology.model_size)
        load = Load(num_tokens=0, num_images=share, num_pairs=0)
        messages = self._messages
        total = ChunkSeconds(
            forward=messages.gather_features_seconds(num_images) + messages.send_towers_seconds(),
            backward=messages.return_gradients_seconds(num_images),
        )
        for name, count in self._encoders.items():
            seconds = self._unit(name, load)
            again = seconds.forward if name.partition("_")[0] in messages.trained_towers else 0.0
            total += ChunkSeconds(forward=seconds.forward, backward=seconds.backward + again) * count
        return total

    @property
    def _encoders(self) -> dict[str, int]:
        return encoder_units(self.model)

    @property
    def _messages(self) -> VisionMessages:
        return VisionMessages(
            model=self.model,
            trained=self.trained,
            topology=self.setting.topology,
            cluster=self.cluster,
            element_bytes=self.element_bytes,
        )

    def _own_images(self, name: str, load: Load) -> Load:
        if self.setting.vision_placement != "split" or name not in self._encoders | adaptor_units(self.model):
            return load
        share = math.ceil(load.num_images / self.setting.topology.tensor_size)
        return replace(load, num_images=share)

    def _unit(self, name: str, load: Load) -> ChunkSeconds:
        seconds = self.timing.unit(name, load)
        run = passes(name, self.trained)
        backward = seconds.input_gradient * run.input_gradient + seconds.weight_gradient * run.weight_gradient
        again = computed_again(name, self.model, self.setting)
        if run.any and again is not None:
            backward += again.share * self.timing.unit(again.name, load).forward
        return ChunkSeconds(forward=seconds.forward, backward=backward)
