"""Where images are encoded changes nothing that a run leaves behind, and may change whenever it resumes."""

import json
from pathlib import Path

import pytest
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.serialization import load_sharded_metadata

from tests.support.runs import command, finish, losses

# The tiny model's last stage trains both encoders. Held-out losses are measured on the way.
STEPS = [
    "stages=[sft]",
    "train.steps=4",
    "heldout.every=2",
    "parallel.tensor_size=2",
    "recompute.vision=true",
]


def heldout(run_dir: Path) -> list[tuple[str, float]]:
    rows = [json.loads(line) for line in (run_dir / "heldout.jsonl").read_text().splitlines()]
    return [(row["source"], row["loss"]) for row in rows]


def saved(run_dir: Path) -> dict[str, tuple[int, ...] | None]:
    """Everything in the last checkpoint, with the shapes of tensors."""
    metadata = load_sharded_metadata(str(run_dir / "checkpoints" / "sft-00000004"))
    return {
        name: value.global_shape if isinstance(value, ShardedTensor) else None
        for name, value in metadata.items()
    }


@pytest.mark.slow
def test_placement_changes_on_resume(data_root: Path, tmp_path: Path) -> None:
    expected, changed = tmp_path / "replicated", tmp_path / "changed"
    status, output = finish(command(data_root, expected, *STEPS))
    assert status == 0, output
    for placement, stop_at in (("spread", 2), ("split", 4)):
        overrides = [*STEPS, f"parallel.vision_placement={placement}", f"train.stop_at={stop_at}"]
        status, output = finish(command(data_root, changed, *overrides))
        assert status == 0, output

    assert len(losses(changed)) == 4
    for one, other in zip(losses(changed), losses(expected), strict=True):
        assert one == pytest.approx(other, rel=1e-4)
    for one, other in zip(heldout(changed), heldout(expected), strict=True):
        assert one[0] == other[0]
        assert one[1] == pytest.approx(other[1], rel=1e-4)
    assert saved(changed) == saved(expected)
