"""How many tokens images become: what planning needs to know of the model."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True)
class ImageTokens:
    """How many tokens images become: the adaptor's output grid, fixed. Tiling would look at sizes."""

    tokens_per_image: int

    def count(self, image_sizes: NDArray[np.int32]) -> NDArray[np.int64]:
        """Tokens of each image [N] from its width and height [N, 2]."""
        return np.full(len(image_sizes), self.tokens_per_image, dtype=np.int64)
