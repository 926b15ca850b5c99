"""Seconds of a pipeline chunk's forward and backward pass over one microbatch, and of what a step does beside those.

Vision placement: *replicated*, every tensor-parallel rank of stage zero encodes all images of the microbatch; *split*,
each encodes its share and gathers the adaptor's output; *spread*, all ranks of a replica encode their share of the
step's images before the pipeline starts, and gather the towers' features, so that only the adaptor stays.
"""

import math
from dataclasses import dataclass, replace

from megatron_vl.config.model import ModelConfig
from megatron_vl.planning.passes import adaptor_units, chunk_units, encoder_units, passes
from megatron_vl.planning.setting import Setting
from megatron_vl.planning.timing import Timing
from megatron_vl.planning.workload import Load


@dataclass(frozen=True, kw_only=True)
class ChunkSeconds:
    forward: float
    backward: float

    def __add__(self, other: "ChunkSeconds") -> "ChunkSeconds":
        return ChunkSeconds(forward=self.forward + other.forward, backward=self.backward + other.backward)


@dataclass(frozen=True, kw_only=True)
class ChunkTimes:
    """How long one rank takes, for one model, stage and setting. `trained`: parts of config.train.PARTS."""

    model: ModelConfig
    trained: frozenset[str]
    setting: Setting
    timing: Timing

    def chunk(self, chunk: str, load: Load) -> ChunkSeconds:
        """Of a chunk, given as its E, t and L. The load's images are whole: a rank's share is found here."""
        placement = self.setting.vision_placement
        vision = encoder_units(self.model) | adaptor_units(self.model)
        total = ChunkSeconds(forward=0.0, backward=0.0)
        for name, count in chunk_units(chunk, self.model).items():
            here = load
            if name in vision and placement == "split":
                here = replace(
                    load, num_images=math.ceil(load.num_images / self.setting.topology.tensor_size)
                )
            if name not in encoder_units(self.model) or placement != "spread":
                seconds = self._unit(name, here)
                total += ChunkSeconds(forward=count * seconds.forward, backward=count * seconds.backward)
        return total

    def encode_seconds(self, num_images: float) -> ChunkSeconds:
        """Before the pipeline starts, under *spread*: a rank's share of the `num_images` of a replica's step. The
        backward pass, where a tower trains, comes after the pipeline's."""
        share = math.ceil(num_images / self.setting.topology.model_size)
        load = Load(num_tokens=0, num_images=share, num_pairs=0)
        total = ChunkSeconds(forward=0.0, backward=0.0)
        for name, count in encoder_units(self.model).items():
            seconds = self._unit(name, load)
            total += ChunkSeconds(forward=count * seconds.forward, backward=count * seconds.backward)
        return total

    def _unit(self, name: str, load: Load) -> ChunkSeconds:
        seconds = self.timing.unit(name, load)
        run = passes(name, self.trained)
        backward = seconds.input_gradient * run.input_gradient + seconds.weight_gradient * run.weight_gradient
        if run.any:
            backward += self._recompute(name, load, seconds.forward)
        return ChunkSeconds(forward=seconds.forward, backward=backward)

    def _recompute(self, name: str, load: Load, forward: float) -> float:
        """Seconds of what the backward pass over a unit computes again."""
        if name == "decoder_layer" and self.setting.recompute == "full":
            return forward
        if name == "decoder_layer" and self.setting.recompute == "selective":
            return self.timing.unit("core_attention", load).forward
        if name.endswith("_block") and self.setting.recompute_vision:
            return forward
        return 0.0
