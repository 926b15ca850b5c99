"""SAM's forward pass on CPU: our attention with relative positions against the published, explicit one.

One block with global attention at full size (4096 tokens, 12 heads) and the whole tower, one image, one thread, medians
of repeats in turns; and the extra memory of the block at its peak. Ends within 6 minutes.
"""

from collections.abc import Callable
from unittest.mock import patch

import torch
from torch import Tensor, nn

from benchmarks.paired import Interval, Times, in_turns, one_thread, paired_ratio, quartiles
from benchmarks.peak_memory import extra_peak_bytes
from benchmarks.report import Goal, print_goals, run_benchmark, table
from megatron_vl.config.model import SamConfig
from megatron_vl.model import sam
from megatron_vl.model.sam import SamBlock, SamEncoder

BLOCK_ROUNDS, TOWER_ROUNDS = 7, 4
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
BLOCK_FASTER = {"fp32": 1.8, "bf16": 1.15}
TOWER_FASTER = 1.3  # in fp32
LESS_MEMORY = 7.0


def explicit_attention(
    q_BATD: Tensor, k_BATD: Tensor, v_BATD: Tensor, row_HHD: Tensor, column_WWD: Tensor
) -> Tensor:
    """As published: all scores of a head, both bias terms added to them, softmax, values."""
    height, width = len(row_HHD), len(column_WWD)
    q_BAHWD = q_BATD.unflatten(2, (height, width))
    scores_BATT = (q_BATD * q_BATD.shape[-1] ** -0.5) @ k_BATD.transpose(-2, -1)
    rows_BAHWK = torch.einsum("bahwd,hkd->bahwk", q_BAHWD, row_HHD)
    columns_BAHWK = torch.einsum("bahwd,wkd->bahwk", q_BAHWD, column_WWD)
    biased = scores_BATT.unflatten(2, (height, width)).unflatten(-1, (height, width))
    biased = biased + rows_BAHWK[..., :, None] + columns_BAHWK[..., None, :]
    return biased.view_as(scores_BATT).softmax(dim=-1) @ v_BATD


def sides(module: nn.Module, x: Tensor) -> dict[str, Callable[[], Tensor]]:
    """A forward pass of the same weights with either attention."""

    @torch.no_grad()
    def ours() -> Tensor:
        return module(x)

    @torch.no_grad()
    def published() -> Tensor:
        with patch.object(sam, "relative_attention", explicit_attention):
            return module(x)

    return {"ours": ours, "published": published}


def global_block(dtype: torch.dtype) -> dict[str, Callable[[], Tensor]]:
    config = SamConfig()
    grid = config.image_size // config.patch_size
    block = _random(SamBlock(config, config.global_layers[0]))
    return sides(block.to(dtype), torch.randn(1, grid, grid, config.width, dtype=dtype))


def tower() -> dict[str, Callable[[], Tensor]]:
    config = SamConfig()
    return sides(_random(SamEncoder(config)), torch.randn(1, 3, config.image_size, config.image_size))


def _random(module: nn.Module) -> nn.Module:
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.02)
    return module


def check_equal(two_sides: dict[str, Callable[[], Tensor]], tolerance: float) -> None:
    """Raises AssertionError where the sides compute different things."""
    torch.testing.assert_close(*(side().float() for side in two_sides.values()), rtol=0, atol=tolerance)


def speed_goal(name: str, times: dict[str, Times], bound: float) -> tuple[Goal, Interval]:
    ratio = paired_ratio(times["published"].cpu, times["ours"].cpu)
    ours, published = (quartiles(times[side].cpu).median for side in ("ours", "published"))
    goal = Goal(
        name=name, ours=ours, peer=published, unit="s", ratio=ratio.median, bound="at least", goal=bound
    )
    return goal, ratio


def memory_goal(precision: str) -> Goal:
    extra = {name: extra_peak_bytes(side) / 2**20 for name, side in global_block(DTYPES[precision]).items()}
    return Goal(
        name=f"times less extra memory, block, {precision}",
        ours=extra["ours"],
        peer=extra["published"],
        unit="MiB",
        ratio=extra["published"] / extra["ours"],
        bound="at least",
        goal=LESS_MEMORY,
    )


def main() -> None:
    one_thread()
    torch.manual_seed(0)
    memory = [memory_goal(precision) for precision in DTYPES]
    check_equal(global_block(torch.float32), 1e-4)
    goals, rows = [], []
    measured = {
        f"block, {precision}": (in_turns(global_block(dtype), BLOCK_ROUNDS), BLOCK_FASTER[precision])
        for precision, dtype in DTYPES.items()
    }
    measured["tower, fp32"] = (in_turns(tower(), TOWER_ROUNDS), TOWER_FASTER)
    for name, (times, bound) in measured.items():
        goal, ratio = speed_goal(f"times as fast, {name}", times, bound)
        goals.append(goal)
        rows.append([name, *(str(quartiles(times[side].cpu)) for side in ("ours", "published")), str(ratio)])
    header = ["CPU seconds: median [quartiles]", "ours", "published", "ratio [95 %]"]
    print(table(header, rows), end="\n\n")
    print_goals("sam", [*goals, *memory])


if __name__ == "__main__":
    run_benchmark(main)
