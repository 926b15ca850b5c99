"""Which of a replica's images a rank encodes, where ranks share them: known to all of them from the plan alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate


@dataclass(frozen=True, kw_only=True)
class ImageSharing:
    """This rank's place among the `size` ranks that share the images of a microbatch, or of a whole step."""

    size: int = 1
    rank: int = 0
    of_step: bool = False

    def shares(self, num_images: Sequence[int]) -> list[range]:
        """This rank's images of each microbatch of a step, of which these are the numbers of images; counted within
        the microbatch."""
        if self.of_step:
            return cut(share(sum(num_images), self.size, self.rank), num_images)
        return [share(number, self.size, self.rank) for number in num_images]


WHOLE = ImageSharing()


def share(num_images: int, size: int, rank: int) -> range:
    """`rank`'s share of images 0 .. num_images - 1 among `size` ranks: neighbours, for they often are of one sample.

    No share is longer than ceil(num_images / size), and the shares before a shorter one are as long as that: padded to
    it and joined, shares begin with all images in order.
    """
    length = -(-num_images // size)
    return range(min(rank * length, num_images), min((rank + 1) * length, num_images))


def cut(share: range, lengths: Sequence[int]) -> list[range]:
    """What of `share` falls into each of consecutive parts of these lengths, counted within the part."""
    starts = accumulate(lengths, initial=0)
    return [
        range(*(min(max(bound - start, 0), length) for bound in (share.start, share.stop)))
        for start, length in zip(starts, lengths, strict=False)
    ]
