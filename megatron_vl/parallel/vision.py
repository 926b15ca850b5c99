"""What stage zero is given of a microbatch's images, by where they are encoded (`parallel.vision_placement`).

Shapes: N images, C channels (3 colours or a tower's width), H W pixels, T tokens of an image.
"""

from dataclasses import dataclass

from torch import Tensor

from megatron_vl.data.microbatch import Microbatch


@dataclass(frozen=True)
class SharedImages:
    """Stage zero's tensor-parallel ranks encode `num_images` together; these are the ones of this rank."""

    images_NCHW: Tensor
    num_images: int


@dataclass(frozen=True)
class TowerFeatures:
    """All images as the towers made them, before the pipeline began: [N, T, C] for each tower, in tower order."""

    features_NTC: tuple[Tensor, ...]


VisionInput = Tensor | SharedImages | TowerFeatures | None  # a tensor: all images, encoded by every rank


def vision_input(microbatch: Microbatch) -> VisionInput:
    """Of a microbatch on stage zero's device."""
    if microbatch.features_NTC is not None:
        return TowerFeatures(microbatch.features_NTC)
    if microbatch.shares_images and microbatch.images_NCHW is not None:
        return SharedImages(microbatch.images_NCHW, microbatch.num_images)
    return microbatch.images_NCHW
