"""Which units a pipeline chunk is made of, and which passes over them run, by what trains.

A unit computes the gradient of its weights if its part trains, and that of its input if anything below it trains. The
decoder's input always requires a gradient (`model.stage_zero`), so everything from the decoder on computes both.
"""

from dataclasses import dataclass

from megatron_vl.config.model import ModelConfig
from megatron_vl.config.model_check import towers
from megatron_vl.planning.work import UnitWork, Work

JOINED_ADAPTORS = ("mlp_gelu", "shared_mlp_gelu")  # one first layer over all towers' features

# The part (config.train.PARTS) that a unit belongs to; the loss has no weights.
PART = {
    "siglip_patch": "siglip",
    "siglip_block": "siglip",
    "sam_patch": "sam",
    "sam_window_block": "sam",
    "sam_global_block": "sam",
    "sam_neck_input": "sam_downsample",
    "sam_neck_output": "sam_downsample",
    "sam_downsample": "sam_downsample",
    "adaptor_sam": "adaptor",
    "adaptor_siglip": "adaptor",
    "adaptor_joined": "adaptor",
    "adaptor_output": "adaptor",
    "embedding": "embedding",
    "decoder_layer": "decoder",
    "final_norm": "decoder",
    "head": "head",
}
# The parts below a unit of stage zero.
BELOW: dict[str, frozenset[str]] = {
    "siglip_patch": frozenset(),
    "siglip_block": frozenset({"siglip"}),
    "sam_patch": frozenset(),
    "sam_window_block": frozenset({"sam"}),
    "sam_global_block": frozenset({"sam"}),
    "sam_neck_input": frozenset({"sam"}),
    "sam_neck_output": frozenset({"sam", "sam_downsample"}),
    "sam_downsample": frozenset({"sam", "sam_downsample"}),
    "adaptor_sam": frozenset({"sam", "sam_downsample"}),
    "adaptor_siglip": frozenset({"siglip"}),
    "adaptor_joined": frozenset({"siglip", "sam", "sam_downsample"}),
    "adaptor_output": frozenset({"siglip", "sam", "sam_downsample", "adaptor"}),
}


@dataclass(frozen=True, kw_only=True)
class Passes:
    """Which backward passes over a unit run; the forward pass always does."""

    input_gradient: bool
    weight_gradient: bool

    @property
    def any(self) -> bool:
        return self.input_gradient or self.weight_gradient


def passes(name: str, trained: frozenset[str]) -> Passes:
    """Those over unit `name` where the parts `trained` train."""
    below = BELOW.get(name)
    return Passes(
        input_gradient=below is None or not below.isdisjoint(trained),
        weight_gradient=PART.get(name) in trained,
    )


def backward(work: UnitWork, run: Passes) -> Work:
    """What the passes that run do together."""
    return work.input_gradient * run.input_gradient + work.weight_gradient * run.weight_gradient


def encoder_units(model: ModelConfig) -> dict[str, int]:
    """The towers' units, and how many of each."""
    siglip, sam = model.vision.siglip, model.vision.sam
    units: dict[str, int] = {}
    if sam is not None:
        num_global = len(set(sam.global_layers))
        units |= {"sam_patch": 1, "sam_window_block": sam.num_layers - num_global}
        units |= {
            "sam_global_block": num_global,
            "sam_neck_input": 1,
            "sam_neck_output": 1,
            "sam_downsample": 1,
        }
    if siglip is not None:
        units |= {"siglip_patch": 1, "siglip_block": siglip.num_layers}
    return units


def adaptor_units(model: ModelConfig) -> dict[str, int]:
    """The adaptor's first layers, and the rest of it."""
    if model.vision.adaptor.kind in JOINED_ADAPTORS:
        return {"adaptor_joined": 1, "adaptor_output": 1}
    return {f"adaptor_{tower}": 1 for tower in towers(model.vision)} | {"adaptor_output": 1}


def chunk_units(chunk: str, model: ModelConfig) -> dict[str, int]:
    """All units of a pipeline chunk, given as its E, t and L (`planning.layout`)."""
    units: dict[str, int] = {}
    if "E" in chunk:
        units |= encoder_units(model) | adaptor_units(model) | {"embedding": 1}
    if "t" in chunk:
        units["decoder_layer"] = chunk.count("t")
    if "L" in chunk:
        units |= {"final_norm": 1, "head": 1, "loss": 1}
    return units
