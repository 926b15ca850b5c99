"""A training state is loaded whole or refused: what a checkpoint lacks, or has too much, is told on every rank."""

from pathlib import Path

import pytest

from megatron_vl.checkpoint.description import Description
from megatron_vl.checkpoint.loading import load_training_state
from megatron_vl.checkpoint.state import RunState
from megatron_vl.checkpoint.store import CheckpointStore
from megatron_vl.config.errors import UserError
from megatron_vl.config.parallel import ParallelConfig
from megatron_vl.config.train import PARTS, CheckpointConfig
from megatron_vl.parallel.gradients import parameters_at_rest
from megatron_vl.train.step import Vote, train_step
from tests.support.ranks import run_ranks
from tests.support.training import Case, batch, build, tiny_model

STATE = RunState(stage="joint", step=1, num_steps=3, global_step=1, plan={}, fingerprint={})


def case(train: tuple[str, ...], tensor_size: int = 1) -> Case:
    return Case(parallel=ParallelConfig(tensor_size=tensor_size), train=train)


def save(folder: Path, of: Case) -> None:
    """After one step, so that there is optimizer state."""
    chunks, optimizer, groups = build(of)
    optimizer.set_learning_rate(1e-3)
    train_step(chunks, optimizer, batch(of, 1, groups), groups, 1.0, Vote())
    store = CheckpointStore(
        folder,
        CheckpointConfig(),
        Description(model=tiny_model(), image_token_id=5, tokens=None),
        folder / "none",
        print,
    )
    with parameters_at_rest(chunks):
        store.save(STATE, chunks, optimizer.inner, groups)
    store.close_stage()


def load(folder: Path, into: Case) -> None:
    chunks, optimizer, groups = build(into)
    load_training_state(folder / "joint-00000001", chunks, optimizer.inner, groups)


@pytest.mark.parametrize(
    ("saved", "wanted", "words"),
    [
        (("adaptor",), PARTS, r"it lacks optimizer\.state\.exp_avg\.language"),
        pytest.param(
            PARTS,
            ("adaptor",),
            "it lacks nothing; it has, and this run has not, optimizer.state.exp_avg.language",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_other_optimizer_state_is_refused(
    saved: tuple[str, ...], wanted: tuple[str, ...], words: str, tmp_path: Path
) -> None:
    run_ranks(1, save, tmp_path, case(saved))
    run_ranks(2, load, tmp_path, case(saved, tensor_size=2))
    with pytest.raises(UserError, match=words):
        run_ranks(2, load, tmp_path, case(wanted, tensor_size=2))
