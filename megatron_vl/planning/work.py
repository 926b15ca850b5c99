"""Work: multiplications and moved bytes, of a pass over a unit of the model, and the primitives units are made of.

A matrix product of m x k and k x n counts 2mkn. Attention is kept apart, since it runs at another speed. Moved bytes
are what passes over memory outside matrix products and attention kernels: norms, activations, residuals, gathers, and
the accumulation of weight gradients.
"""

from dataclasses import dataclass, field

MAIN_GRADIENT_BYTES = 4  # gradients accumulate in fp32


@dataclass(frozen=True, kw_only=True)
class Work:
    matmul_flops: float = 0.0
    attention_flops: float = 0.0
    moved_bytes: float = 0.0

    @property
    def flops(self) -> float:
        return self.matmul_flops + self.attention_flops

    def __add__(self, other: "Work") -> "Work":
        return Work(
            matmul_flops=self.matmul_flops + other.matmul_flops,
            attention_flops=self.attention_flops + other.attention_flops,
            moved_bytes=self.moved_bytes + other.moved_bytes,
        )

    def __mul__(self, times: float) -> "Work":
        return Work(
            matmul_flops=times * self.matmul_flops,
            attention_flops=times * self.attention_flops,
            moved_bytes=times * self.moved_bytes,
        )


NOTHING = Work()


@dataclass(frozen=True, kw_only=True)
class UnitWork:
    """What each pass over a unit does; which of them run is for `planning.passes` to say."""

    forward: Work = field(default=NOTHING)
    input_gradient: Work = field(default=NOTHING)
    weight_gradient: Work = field(default=NOTHING)

    def __add__(self, other: "UnitWork") -> "UnitWork":
        return UnitWork(
            forward=self.forward + other.forward,
            input_gradient=self.input_gradient + other.input_gradient,
            weight_gradient=self.weight_gradient + other.weight_gradient,
        )

    def __mul__(self, times: float) -> "UnitWork":
        return UnitWork(
            forward=self.forward * times,
            input_gradient=self.input_gradient * times,
            weight_gradient=self.weight_gradient * times,
        )


def product(rows: float, inputs: float, outputs: float) -> UnitWork:
    """A matrix product of activations [rows, inputs] with weights [inputs, outputs]; all passes multiply alike."""
    flops = Work(matmul_flops=2 * rows * inputs * outputs)
    return UnitWork(forward=flops, input_gradient=flops, weight_gradient=flops)


def linear(rows: float, inputs: float, outputs: float, element_bytes: int) -> UnitWork:
    """A product whose weight gradient is then added to the fp32 buffer of gradients, whatever the number of rows, even
    zero: every parameter that trains gets a gradient from every microbatch."""
    added = Work(moved_bytes=inputs * outputs * (element_bytes + 2 * MAIN_GRADIENT_BYTES))
    return product(rows, inputs, outputs) + UnitWork(weight_gradient=added)


def attention(pairs: float, key_width: float, value_width: float) -> UnitWork:
    """Fused attention over `pairs` of tokens; widths are summed over heads.

    Forward: scores, and the sum of values. Backward: scores again, and the gradients of scores, queries, keys and
    values. No weights of its own: its whole backward pass is input gradient.
    """
    return UnitWork(
        forward=Work(attention_flops=2 * pairs * (key_width + value_width)),
        input_gradient=Work(attention_flops=2 * pairs * (3 * key_width + 2 * value_width)),
    )


def moved(forward: float, input_gradient: float) -> UnitWork:
    """Operations that only move data: bytes read and written by each pass."""
    return UnitWork(forward=Work(moved_bytes=forward), input_gradient=Work(moved_bytes=input_gradient))


def norm(num_bytes: float) -> UnitWork:
    """A normalisation of `num_bytes` of activations: read and written; for the gradient two are read."""
    return moved(2 * num_bytes, 3 * num_bytes)


def residual(num_bytes: float) -> UnitWork:
    """An addition of two streams of `num_bytes`; backward two gradients meet."""
    return moved(3 * num_bytes, 3 * num_bytes)


def activation(num_bytes: float) -> UnitWork:
    """An elementwise function of `num_bytes`."""
    return moved(2 * num_bytes, 3 * num_bytes)
