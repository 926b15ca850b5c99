"""Checkpoints at other parallel sizes: as they are where they can serve, resharded where they cannot."""

from pathlib import Path

import pytest
import torch

from megatron_vl.checkpoint.convert.resharding import reshard
from megatron_vl.config.errors import UserError
from megatron_vl.config.parallel import ParallelConfig
from tests.support.ranks import run_ranks
from tests.support.saving import all_tensors, resumed_by, saved_by, store_in, trainee
from tests.support.training import Case

ONE, PP2 = Case(), Case(parallel=ParallelConfig(pipeline_size=2, layout="Et|tttL"))
TP2 = Case(parallel=ParallelConfig(tensor_size=2))
GRID = Case(parallel=ParallelConfig(tensor_size=2, pipeline_size=2, layout="Et|tttL"))
NAME = "joint-00000002"


@pytest.fixture(scope="module")
def in_buckets(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[float]]:
    """Two steps at DP 2, and the losses of the next two. Not to be changed."""
    folder = tmp_path_factory.mktemp("buckets")
    losses = run_ranks(2, saved_by, ONE, folder, 2, "dp_reshardable")[0]
    return folder / NAME, losses


@pytest.mark.parametrize("data_size", [1, 4])
def test_buckets_serve_another_data_parallel_size(
    data_size: int, in_buckets: tuple[Path, list[float]]
) -> None:
    checkpoint, losses = in_buckets
    assert run_ranks(data_size, resumed_by, ONE, checkpoint)[0] == pytest.approx(losses, abs=1e-5)


def test_other_sizes_take_the_command_that_is_told(
    in_buckets: tuple[Path, list[float]], tmp_path: Path
) -> None:
    checkpoint, losses = in_buckets
    with pytest.raises(UserError) as raised:
        run_ranks(2, resumed_by, PP2, checkpoint)
    assert (
        f"python -m launch.convert direction=reshard checkpoint={checkpoint} output={checkpoint}.resharded "
        "parallel.pipeline_size=2 parallel.layout='\"Et|tttL\"'; then start this run again"
    ) in str(raised.value)
    reshard(checkpoint, tmp_path / NAME, PP2.parallel)
    assert run_ranks(2, resumed_by, PP2, tmp_path / NAME)[0] == pytest.approx(losses, abs=1e-5)


def save_in_both_layouts(case: Case, folder: Path) -> None:
    one = trainee(case)
    one.train(1)
    for sharding in ("fully_reshardable", "dp_reshardable"):
        blocking = store_in(folder / sharding, case, asynchronous=False, optimizer_sharding=sharding)
        one.save(blocking)


@pytest.mark.parametrize(
    ("case", "num_ranks"),
    [(TP2, 2), pytest.param(GRID, 8, marks=pytest.mark.slow)],
    ids=["TP2", "TP2 PP2 DP2"],
)
def test_resharded_buckets_are_what_is_stored_by_parameter(
    case: Case, num_ranks: int, tmp_path: Path
) -> None:
    """Bit for bit: under tensor parallelism, where SwiGLU's halves are apart, and with an uneven layout."""
    run_ranks(num_ranks, save_in_both_layouts, case, tmp_path)
    name = "joint-00000001"
    reshard(tmp_path / "dp_reshardable" / name, tmp_path / name, ONE.parallel)
    resharded, expected = all_tensors(tmp_path / name), all_tensors(tmp_path / "fully_reshardable" / name)
    assert resharded.keys() == expected.keys()
    assert all(torch.equal(resharded[name], expected[name]) for name in expected)
