"""A benchmark's last line: JSON with the agreed keys, whose `met` needs every goal; peers are never left out."""

import json
from pathlib import Path
from typing import Literal

import pytest

from benchmarks import image_path, loaders, peer_environments
from benchmarks.report import Goal, print_goals, run_benchmark, table
from megatron_vl.config.errors import UserError

Bound = Literal["at least", "at most"]


def goal(bound: Bound, ratio: float, value: float) -> Goal:
    return Goal(name="cpu", ours=5.0, peer=20.0, unit="ms", ratio=ratio, bound=bound, goal=value)


def printed(capsys: pytest.CaptureFixture[str], *goals: Goal) -> dict[str, object]:
    print_goals("image_path", goals)
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert isinstance(summary, dict)
    return summary


def test_the_last_line_is_json_with_the_first_goal_s_figures(capsys: pytest.CaptureFixture[str]) -> None:
    summary = printed(capsys, goal("at least", 4.0, 4.0), goal("at most", 1.2, 1.25))
    assert {key: summary[key] for key in ("name", "ours", "peer", "ratio", "goal", "met")} == {
        "name": "image_path",
        "ours": 5.0,
        "peer": 20.0,
        "ratio": 4.0,
        "goal": 4.0,
        "met": True,
    }


@pytest.mark.parametrize(
    ("figures", "met"),
    [
        (("at least", 3.99, 4.0), False),
        (("at most", 1.25, 1.25), True),
        (("at most", 1.26, 1.25), False),
    ],
)
def test_one_goal_that_is_missed_is_the_benchmark_s(
    figures: tuple[Bound, float, float],
    met: bool,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert printed(capsys, goal("at least", 9.0, 4.0), goal(*figures))["met"] is met


def test_a_table_s_columns_are_aligned() -> None:
    lines = table(["side", "ms"], [["ours", 4.25], ["a long name", 12.0]]).splitlines()
    assert lines == [
        "side             ms",
        "-----------  ------",
        "ours          4.250",
        "a long name  12.000",
    ]


def test_what_a_user_can_mend_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> None:
        raise UserError("the environment of litdata cannot be made")

    with pytest.raises(SystemExit) as ended:
        run_benchmark(main)
    assert (ended.value.code, capsys.readouterr().err) == (
        1,
        "error: the environment of litdata cannot be made\n",
    )


@pytest.mark.parametrize(
    ("peer", "decode", "met"), [(20.0, 3.0, True), (19.0, 3.0, False), (20.0, 2.5, False)]
)
def test_the_image_path_is_compared_with_the_peer_and_with_its_stages(
    peer: float, decode: float, met: bool
) -> None:
    stages = {"read": 0.25, "decode": decode, "resize": 0.5, "pad": 0.25}
    goals = image_path.goals({"webdataset + Pillow": peer, "ours": 5.0, **stages})
    assert all(goal.met for goal in goals) is met


@pytest.mark.parametrize(("litdata", "met"), [(5.0, True), (4.9, False)])
def test_loaders_are_compared_with_the_fastest_peer_for_both_towers(litdata: float, met: bool) -> None:
    medians = {("ours", "our recipe"): 5.0, ("webdataset", "our recipe"): 1.0}
    medians |= {("webdataset", "both towers"): 6.0, ("litdata", "both towers"): litdata}
    (goal,) = loaders.goals(medians)
    assert (goal.peer, goal.met) == (litdata, met)


def test_an_environment_that_cannot_be_made_is_an_error_with_the_peer_s_name(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(peer_environments, "CACHE", tmp_path)
    monkeypatch.setattr("sys.executable", "false")
    with pytest.raises(UserError, match=r"litdata: `false -m venv .* failed with status 1"):
        peer_environments.peer_python("litdata")
