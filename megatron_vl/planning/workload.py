"""What a stage asks of the ranks: the loads of its microbatches, and how often which kind of step comes.

A *load* is what one microbatch makes a unit of the model work on; a *workload* is a whole stage.
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Load:
    """One microbatch. `num_pairs`: pairs of tokens that see each other, a token with itself counted half, so a row of
    one causal segment of s tokens has s^2 / 2."""

    num_tokens: float
    num_images: float
    num_pairs: float


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One stage of training, as far as time and memory depend on it.

    `images_per_row` is the mean of multimodal rows, `max_images_per_row` what memory must hold; `segment_tokens` is
    the mean length of what shares a row. `text_ratio` is the share of text-only steps, its warm-up included.
    """

    stage: str
    trained: frozenset[str]  # of config.train.PARTS
    num_steps: int
    global_batch_size: int  # rows
    sequence_length: int  # tokens of a row
    text_ratio: float
    images_per_row: float
    max_images_per_row: int
    segment_tokens: float

    def load(self, num_rows: float, num_images: float) -> Load:
        """A microbatch of `num_rows` rows that hold `num_images` images together."""
        tokens = num_rows * self.sequence_length
        return Load(
            num_tokens=tokens, num_images=num_images, num_pairs=tokens * min(self.segment_tokens, tokens) / 2
        )
