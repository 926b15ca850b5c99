"""Which nodes are called unfit, of reports made up; and that pairs of neighbours find who is slow."""

from dataclasses import replace
from pathlib import Path

import pytest

from launch.node_table import show
from megatron_vl.config.errors import UserError
from megatron_vl.config.node_check import NodeCheckConfig, check_limits
from megatron_vl.measure.node_check import rounds, write_and_read
from megatron_vl.measure.node_judge import (
    GIB,
    RankReport,
    Verdict,
    judge_alone,
    judge_together,
)

LIMITS = NodeCheckConfig()


def reports(num_nodes: int = 4) -> list[RankReport]:
    """Of fit nodes with two ranks each, in the order of ranks."""
    return [
        RankReport(
            node=f"n{node}",
            device="cuda",
            matmul_flops=1e14,
            free_bytes=500 * GIB if first else None,
            seconds_since_epoch=1e9,
            bandwidths=(1e10, 1e10),
        )
        for node in range(num_nodes)
        for first in (True, False)
    ]


def test_fit_nodes() -> None:
    assert judge_alone(reports(), Path("run"), LIMITS) == {}
    assert judge_together(reports(), LIMITS) == {}


@pytest.mark.parametrize(
    ("rank", "change", "told"),
    [
        (3, {"matmul_flops": 0.7e14}, "matrix products at 70.00 TFLOP/s, 70% of the median"),
        (2, {"free_bytes": 5 * GIB}, "5.0 GiB free"),
        (3, {"problem": "local rank 1 has no GPU"}, "local rank 1 has no GPU"),
        (3, {"device": "cpu"}, "no GPU, as other nodes have"),
    ],
)
def test_a_bad_node_alone(rank: int, change: dict[str, object], told: str) -> None:
    given = reports()
    given[rank] = replace(given[rank], **change)
    (found,) = judge_alone(given, Path("run"), LIMITS).items()
    assert found[0] == "n1"
    assert told in found[1][0]


def test_a_folder_without_space_is_nobodys_fault() -> None:
    given = [replace(one, free_bytes=one.free_bytes and GIB) for one in reports()]
    with pytest.raises(
        UserError, match=r"run\.dir=run has 1\.0 GiB free, below node_check\.min_free_gib=100"
    ):
        judge_alone(given, Path("run"), LIMITS)
    assert judge_alone(given, Path("run"), NodeCheckConfig(min_free_gib=0)) == {}


def test_a_clock() -> None:
    given = [replace(one, seconds_since_epoch=1e9 - 3 * (one.node == "n2")) for one in reports()]
    assert judge_together(given, LIMITS) == {"n2": ["its clock is -3.0 s off"]}


def test_where_nobody_answers_no_node_is_named() -> None:
    """As when the network is away; of two nodes either may be the one."""
    silent = [replace(one, problem="no answer", bandwidths=()) for one in reports()]
    assert judge_together(silent, LIMITS) == {"": ["no answer"]}
    assert list(judge_together(silent[:4], LIMITS)) == ["n0", "n1"]
    assert list(judge_together([*silent[:4], *reports()[4:]], LIMITS)) == ["n0", "n1"]


def test_a_node_whose_ranks_came_to_different_rounds_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    found = [
        replace(reports()[0], problem="broke", bandwidths=(1e9,)),
        RankReport(node="n0", problem="silent"),
    ]
    show(Verdict(reports=found, wrong=judge_together(found, LIMITS)))
    assert "broke; silent" in capsys.readouterr().err


@pytest.mark.parametrize("num_nodes", [3, 4, 5, 8])
@pytest.mark.parametrize("slow", [0, 1, 2])
def test_the_slow_node_is_named_and_not_its_neighbours(num_nodes: int, slow: int) -> None:
    """A pair is as fast as its slower node."""
    found: dict[str, list[float]] = {f"n{node}": [] for node in range(num_nodes)}
    for pairs in rounds(list(found)):
        assert len({node for pair in pairs for node in pair}) == sum(map(len, pairs)), (
            "a node is in two pairs"
        )
        for pair in pairs:
            for node in pair:
                found[node].append(1e9 if f"n{slow}" in pair else 1e10)
    given = [replace(one, bandwidths=tuple(found[one.node])) for one in reports(num_nodes)]
    assert list(judge_together(given, LIMITS)) == [f"n{slow}"]


def test_writing_leaves_nothing(tmp_path: Path) -> None:
    write_and_read(tmp_path / "file", 1000)
    assert not list(tmp_path.iterdir())
    with pytest.raises(OSError, match="nowhere"):
        write_and_read(tmp_path / "nowhere" / "file", 1000)


@pytest.mark.parametrize(
    ("field", "value"), [("min_matmul_share", 1.5), ("repeats", 0), ("min_free_gib", -1.0)]
)
def test_limits_that_make_no_sense(field: str, value: float) -> None:
    with pytest.raises(UserError, match=f"node_check.{field}={value}"):
        check_limits(replace(LIMITS, **{field: value}))
