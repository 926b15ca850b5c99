"""The vision encoders by name, and the towers of one model run together.

Shapes: N images, C channels (3 colours or features), H W pixels, T image tokens.
"""

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from megatron_vl.config.errors import UserError
from megatron_vl.config.model import VisionConfig
from megatron_vl.model.sam import SamEncoder
from megatron_vl.model.siglip import SiglipEncoder
from megatron_vl.model.vit import VisionEncoder

# A field of VisionConfig -> the encoder built from its value. In tower order: the adaptor gets the features
# of the high-resolution tower first.
ENCODERS: dict[str, Callable[[Any], VisionEncoder]] = {"sam": SamEncoder, "siglip": SiglipEncoder}

SAM_DOWNSAMPLE = ("neck", "neck_hd", "downsamples", "hd_alpha")  # children of SamEncoder after its trunk


def build_encoders(vision: VisionConfig) -> dict[str, VisionEncoder]:
    """The encoders that `vision` configures, by name, in tower order."""
    configs = {name: getattr(vision, name) for name in ENCODERS}
    return {name: ENCODERS[name](config) for name, config in configs.items() if config is not None}


class VisionTowers(nn.ModuleDict):
    """All encoders of a model (its children, by name), fed the same images, each at its own resolution.

    At most `max_images_per_forward` images are encoded at once, which bounds the memory of activations that
    no backward pass needs; `recompute` drops those inside the blocks that one does need, and computes them
    again for it.
    """

    def __init__(
        self, encoders: Mapping[str, VisionEncoder], max_images_per_forward: int, recompute: bool = False
    ) -> None:
        super().__init__(encoders)
        self.max_images_per_forward = max_images_per_forward
        self.recompute = recompute

    @property
    def encoders(self) -> list[VisionEncoder]:
        """In tower order."""
        return [cast(VisionEncoder, encoder) for encoder in self.values()]

    @property
    def output_widths(self) -> list[int]:
        """The width of each tower's features, in tower order."""
        return [encoder.output_width for encoder in self.encoders]

    @property
    def num_tokens(self) -> int:
        """T, the same for all towers."""
        return self.encoders[0].num_tokens

    @property
    def trained(self) -> list[str]:
        """The towers of which some parameter trains, in tower order."""
        return [name for name, tower in self.items() if any(p.requires_grad for p in tower.parameters())]

    def forward(self, images_NCHW: Tensor, only: Collection[str] | None = None) -> list[Tensor]:
        """Images (uint8, squares of the largest `image_size`, N > 0) -> each tower's features [N, T, C].

        `only` these towers, in tower order; None asks for all.
        """
        encoders = [
            cast(VisionEncoder, tower) for name, tower in self.items() if only is None or name in only
        ]
        chunks = [
            self._encode(encoders, chunk) for chunk in torch.split(images_NCHW, self.max_images_per_forward)
        ]
        return [torch.cat(features) for features in zip(*chunks, strict=True)]

    def _encode(self, encoders: list[VisionEncoder], images_NCHW: Tensor) -> list[Tensor]:
        unit_NCHW = images_NCHW.float().div_(255)
        return [encoder(encoder.normalize(unit_NCHW), self.recompute) for encoder in encoders]


def build_towers(vision: VisionConfig, recompute: bool = False, compiler: str | None = None) -> VisionTowers:
    """The towers that `vision` configures, uninitialised. `compiler`: a backend of torch.compile for their blocks.

    Raises:
        UserError: torch has no such backend.
    """
    towers = VisionTowers(build_encoders(vision), vision.max_images_per_forward, recompute)
    if compiler is not None:
        _compile_blocks(towers, compiler)
    return towers


def _compile_blocks(towers: VisionTowers, backend: str) -> None:
    backends = torch.compiler.list_backends(exclude_tags=())
    if backend not in backends:
        raise UserError(f"parallel.compile_vision={backend}: not one of {', '.join(backends)}")
    for encoder in towers.encoders:
        for block in encoder.blocks:
            block.compile(backend=backend)  # in place: names of parameters stay


def part_of(parameter_name: str) -> str:
    """The part, as `stage.<name>.train` lists it: siglip, sam (trunk), sam_downsample or adaptor.

    The name is relative to a module with the children `towers` (VisionTowers) and `adaptor`.

    Raises:
        ValueError: no vision parameter has such a name.
    """
    match parameter_name.split("."):
        case ["adaptor", *_]:
            return "adaptor"
        case ["towers", "sam", child, *_] if child in SAM_DOWNSAMPLE:
            return "sam_downsample"
        case ["towers", name, *_] if name in ENCODERS:
            return name
    raise ValueError(
        f"{parameter_name!r} is a parameter of neither towers.{{{','.join(ENCODERS)}}} nor adaptor"
    )


@torch.no_grad()
def initialize_vision(
    module: nn.Module, generator_for: Callable[[str], torch.Generator], std: float = 0.02
) -> None:
    """Give every parameter of the children `towers` and `adaptor` its initial value (`vision_initializers`)."""
    draws = vision_initializers(module, generator_for, std)
    for name, parameter in module.named_parameters():
        if name in draws:
            parameter.copy_(draws[name]())


def vision_initializers(
    module: nn.Module, generator_for: Callable[[str], torch.Generator], std: float = 0.02
) -> dict[str, Callable[[], Tensor]]:
    """How to draw every parameter of the children `towers` and `adaptor`, each from a generator of its own.

    Weights of Linear and Conv2d: normal with standard deviation 1/sqrt(fan in), which keeps the signal's size
    at any width, so that even a tower that stays random passes its input on. Positions, absolute and
    relative: normal with `std`. Norms 1, biases 0, HD alpha 0.

    `generator_for(name)` gives a CPU generator for the parameter `name` of `module`, which may be on the meta
    device; values are drawn in fp32 and depend on neither order nor device.
    """

    def initializer(owner: nn.Module, path: str, name: str, parameter: Tensor) -> Callable[[], Tensor]:
        deviation = _standard_deviation(owner, name, parameter, std)
        if deviation > 0:
            return lambda: torch.randn(parameter.shape, generator=generator_for(f"{path}.{name}")) * deviation
        return lambda: torch.full(
            parameter.shape, 1.0 if isinstance(owner, nn.LayerNorm) and name == "weight" else 0.0
        )

    return {
        f"{path}.{name}": initializer(owner, path, name, parameter)
        for path, owner in module.named_modules()
        if path.split(".")[0] in ("towers", "adaptor")
        for name, parameter in owner.named_parameters(recurse=False)
    }


def _standard_deviation(owner: nn.Module, name: str, parameter: Tensor, std: float) -> float:
    if name in ("bias", "hd_alpha") or isinstance(owner, nn.LayerNorm):
        return 0.0
    if name in ("pos_embed", "rel_pos_h", "rel_pos_w"):
        return std
    if isinstance(owner, nn.Linear | nn.Conv2d):
        return 1 / math.sqrt(math.prod(parameter.shape[1:]))
    raise ValueError(f"no rule for the initial value of {name!r} in {type(owner).__name__}")
