"""FLOPs that a model cannot do without, whoever computes them: what model FLOPs utilisation (MFU) counts."""

from dataclasses import dataclass

from megatron_vl.config.model import ModelConfig
from megatron_vl.planning.cost import CostModel
from megatron_vl.planning.passes import backward, chunk_units, encoder_units, passes
from megatron_vl.planning.workload import Load


@dataclass(frozen=True, kw_only=True)
class UsefulFlops:
    """Of all ranks together, without recompute. The decoder and the head count three times their forward pass, as is
    usual, whatever trains; the towers and the adaptor what must be computed of them, given what trains."""

    per_token: float
    per_pair: float  # of tokens that see each other, as `planning.workload.Load` counts them
    per_image: float

    def language(self, num_tokens: float, num_pairs: float) -> float:
        return self.per_token * num_tokens + self.per_pair * num_pairs

    def vision(self, num_images: float) -> float:
        return self.per_image * num_images


def useful_flops(model: ModelConfig, trained: frozenset[str]) -> UsefulFlops:
    """`trained`: parts of config.train.PARTS. Costs are linear, so one token, pair or image tells them all."""
    costs = CostModel(model=model)

    def language(load: Load) -> float:
        layers = model.language.num_layers * costs.unit("decoder_layer", load).forward.flops
        return 3 * (layers + costs.unit("head", load).forward.flops)

    image = Load(num_tokens=0.0, num_images=1.0, num_pairs=0.0)
    vision = 0.0
    for name, count in _vision_units(model).items():
        work = costs.unit(name, image)
        vision += count * (work.forward + backward(work, passes(name, trained))).flops
    return UsefulFlops(
        per_token=language(Load(num_tokens=1.0, num_images=0.0, num_pairs=0.0)),
        per_pair=language(Load(num_tokens=0.0, num_images=0.0, num_pairs=1.0)),
        per_image=vision,
    )


def _vision_units(model: ModelConfig) -> dict[str, int]:
    """Of stage zero, without the text embedding."""
    if not encoder_units(model):
        return {}
    return {name: count for name, count in chunk_units("E", model).items() if name != "embedding"}
