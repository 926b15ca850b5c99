"""What a stage asks of the ranks: the loads of its microbatches, and how often which kind of step comes.

A *load* is what one microbatch makes a unit of the model work on; a *workload* is a whole stage.
"""

from dataclasses import dataclass

from megatron_vl.config.train import StageConfig


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

    `images_per_row` is the mean of multimodal rows, `max_images_per_row` what memory must hold; `tokens_per_row` is the
    mean, at most `sequence_length`, and `segment_tokens` the mean length of what shares a row. `text_ratio` is the
    share of text-only steps, its warm-up included.
    """

    stage: str
    trained: frozenset[str]  # of config.train.PARTS
    num_steps: int
    global_batch_size: int  # rows
    sequence_length: int  # tokens of a row
    text_ratio: float
    images_per_row: float
    max_images_per_row: int
    tokens_per_row: float
    segment_tokens: float

    def load(self, num_rows: float, num_images: float) -> Load:
        """A microbatch of `num_rows` rows that hold `num_images` images together."""
        tokens = num_rows * self.tokens_per_row
        return Load(num_tokens=tokens, num_images=num_images, num_pairs=tokens * self.segment_tokens / 2)


def stage_workload(name: str, values: StageConfig, max_images_per_row: int) -> Workload:
    """What stage `name` asks for by its values, with what it says to expect of its rows."""
    expected = values.expected
    tokens_per_row = min(expected.tokens or values.sequence_length, values.sequence_length)
    warmup_share = (1 - values.text_ratio) * values.text_warmup_fraction / 2  # it falls linearly from 1
    return Workload(
        stage=name,
        trained=frozenset(values.train),
        num_steps=values.steps,
        global_batch_size=values.global_batch_size,
        sequence_length=values.sequence_length,
        text_ratio=values.text_ratio + warmup_share,
        images_per_row=expected.images,
        max_images_per_row=max_images_per_row,
        tokens_per_row=tokens_per_row,
        segment_tokens=min(expected.segment_tokens or tokens_per_row, tokens_per_row),
    )
