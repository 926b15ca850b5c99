"""What switches of the plan do to a run: dealing rows to ranks changes no loss, changed sources begin anew."""

from pathlib import Path

import pytest

from megatron_vl.train.step import check_plans
from tests.support.runs import command, finish, metrics


def run(data_root: Path, run_dir: Path, *overrides: str) -> tuple[int, str]:
    fixed = ("stages=[joint]", "data.text_ratio=0.5", "heldout.max_samples=0", "run.num_processes=2")
    return finish(command(data_root, run_dir, *fixed, *overrides))


def test_dealing_rows_to_ranks_changes_no_loss(data_root: Path, tmp_path: Path) -> None:
    """Mixed steps of eight rows at data-parallel size 2, dealt by cost or left where they were planned."""
    common = ("train.steps=4", "train.global_batch_size=8", "stage.joint.grouping=phase")
    for name, balance_lanes in (("dealt", 64), ("planned", 0)):
        status, output = run(data_root, tmp_path / name, *common, f"data.balance_lanes={balance_lanes}")
        assert status == 0, output
    for dealt, planned in zip(metrics(tmp_path / "dealt"), metrics(tmp_path / "planned"), strict=True):
        assert dealt["loss"] == pytest.approx(planned["loss"], rel=1e-5)
        assert dealt["grad_norm"] == pytest.approx(planned["grad_norm"], rel=1e-4)
        for count in ("num_tokens", "num_samples", "num_images", "num_supervised_tokens"):
            assert dealt[count] == planned[count]
        assert (dealt["modality"], dealt["text_share"]) == ("mixed", 0.5)
        assert 0 < dealt["bytes_used"] <= dealt["bytes_fetched"]


@pytest.mark.slow
def test_a_changed_mixture_is_refused_or_goes_on_as_configured(data_root: Path, tmp_path: Path) -> None:
    status, output = run(data_root, tmp_path, "train.steps=4", "train.stop_at=2")
    assert status == 0, output
    changed = ("train.steps=4", "stage.joint.sources.figures=0", "stage.joint.sources.text=2.0")
    status, output = run(data_root, tmp_path, *changed)
    assert status == 1
    assert "stage.joint.sources.figures=0" in output.splitlines()[-1]
    status, output = run(data_root, tmp_path, *changed, "data.on_change=restart_sources")
    assert status == 0, output
    assert "stage.joint.sources.text was 1.0 and is 2.0" in output
    assert "source figures ends" in output
    assert [row["step"] for row in metrics(tmp_path)] == [1, 2, 3, 4]


def test_ranks_that_planned_other_rows_than_their_group_are_named() -> None:
    check_plans([0.0, 0.0, 2.0, 2.0], [7.0, 7.0, 9.0, 9.0])
    with pytest.raises(
        RuntimeError, match=r"ranks \[3, 5\] planned other rows than rank\(s\) \[2, 4\] of their group"
    ):
        check_plans([0.0, 0.0, 2.0, 2.0, 4.0, 4.0], [7.0, 7.0, 9.0, 8.0, 1.0, 2.0])
