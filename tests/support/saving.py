"""Checkpoints of the tiny model on gloo ranks: trained, saved, loaded, compared."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_vl.checkpoint.description import Description
from megatron_vl.checkpoint.loading import load_training_state
from megatron_vl.checkpoint.manifest import read_manifest
from megatron_vl.checkpoint.state import RunState
from megatron_vl.checkpoint.store import CheckpointStore, Saved
from megatron_vl.checkpoint.streaming import read_tensors
from megatron_vl.config.train import CheckpointConfig
from megatron_vl.parallel.gradients import parameters_at_rest
from megatron_vl.parallel.groups import Groups
from megatron_vl.train.optimizer import Optimizer
from megatron_vl.train.step import Vote, train_step
from tests.support.training import Case, batch, build, model_of


@dataclass
class Trainee:
    """The model of this rank, what trains it, and how many steps it has taken."""

    case: Case
    chunks: list[Any]
    optimizer: Optimizer
    groups: Groups
    step: int = 0

    def train(self, num_steps: int, store: CheckpointStore | None = None) -> list[float]:
        """The losses. A `store` goes on with what it saves, as in training."""
        losses = []
        for _ in range(num_steps):
            self.step += 1
            self.optimizer.set_learning_rate(1e-3)
            rows = batch(self.case, self.step, self.groups)
            vote = Vote(saving=store is not None and store.is_busy())
            result = train_step(self.chunks, self.optimizer, rows, self.groups, 1.0, vote)
            losses.append(result.loss)
            if store is not None:
                store.advance(busy=result.saving)
        return losses

    def save(self, store: CheckpointStore) -> None:
        with parameters_at_rest(self.chunks):
            store.save(state_at(self.step), self.chunks, self.optimizer.inner, self.groups)

    def load(self, path: Path) -> None:
        load_training_state(path, self.chunks, self.optimizer.inner, self.groups)
        self.step = int(path.name.split("-")[1].split(".")[0])


def trainee(case: Case) -> Trainee:
    """Collective."""
    return Trainee(case, *build(case))


def state_at(step: int) -> RunState:
    return RunState(stage="joint", step=step, num_steps=100, global_step=step, plan={}, fingerprint={})


def store_in(
    folder: Path, case: Case, on_saved: Callable[[Saved], None] = lambda saved: None, **values: Any
) -> CheckpointStore:
    description = Description(model=model_of(case), image_token_id=5, tokens=None)
    return CheckpointStore(folder, CheckpointConfig(**values), description, folder / "none", on_saved)


def saved_by(case: Case, folder: Path, num_steps: int, sharding: str) -> list[float]:
    """Train, save, and train on: the losses after the checkpoint. To be called by `run_ranks`."""
    one = trainee(case)
    one.train(num_steps)
    one.save(store_in(folder, case, asynchronous=False, optimizer_sharding=sharding))
    return one.train(2)


def resumed_by(case: Case, checkpoint: Path) -> list[float]:
    """The losses after a checkpoint. To be called by `run_ranks`."""
    one = trainee(case)
    one.load(checkpoint)
    return one.train(2)


def tensor_files(checkpoint: Path) -> dict[str, str]:
    """Digests of the files that hold tensors."""
    return {
        name: record.sha256 for name, record in read_manifest(checkpoint).items() if name.endswith(".distcp")
    }


def all_tensors(checkpoint: Path) -> dict[str, Any]:
    return {name: entry.read() for name, entry in read_tensors(checkpoint).items()}


def rank() -> int:
    return dist.get_rank()
