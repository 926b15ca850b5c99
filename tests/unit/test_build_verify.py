"""`data_tools.verify` names what is damaged; test_verify_damage.py has more kinds of damage."""

import io
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
from PIL import Image

from data_tools.command import text_rule
from data_tools.quickstart.tokenizer import train_tokenizer
from data_tools.shard_check import shard_problems
from data_tools.verify import folder_problems, verify
from data_tools.workers import MAX_WAITING_TASKS, in_order, worker_pool
from megatron_vl.config.data import DataConfig, SourceConfig
from megatron_vl.config.errors import UserError
from megatron_vl.data.index import SourceIndex
from megatron_vl.data.indexing import build_index
from megatron_vl.data.shards import ShardWriter


def png(colour: str) -> bytes:
    file = io.BytesIO()
    Image.effect_noise((40, 30), 90).point(lambda value: value if colour == "grey" else 255 - value).save(
        file, "PNG"
    )
    return file.getvalue()


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four samples in two shards: one text, three with an image."""
    root = tmp_path_factory.mktemp("verify") / "data"
    with ShardWriter(root / "mixed", max_samples=2) as writer:
        writer.write("a", {"text": "no image here"})
        writer.write("b", {"text": "<image>one"}, {"0.png": png("grey")})
        writer.write("c", {"text": "<image>two"}, {"0.png": png("negative")})
        writer.write("d", {"text": "<image>three"}, {"0.png": png("grey")})
    config = config_for(root)
    tokens = [config.bos_token, config.eos_token, config.image_token]
    train_tokenizer(["one two three"], root / "tokenizer.json", tokens)
    build_index(root / "mixed", text_rule(config), max_sample_bytes=10**6)
    return root


def config_for(root: Path) -> DataConfig:
    source = SourceConfig(path=str(root / "mixed"), modality="multimodal")
    return DataConfig(
        name="mine", root=str(root), sources={"mixed": source}, tokenizer=f"{root}/tokenizer.json"
    )


@pytest.fixture
def root(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "data"))


def damage(root: Path, key_row: int, *, image: bool) -> tuple[str, int]:
    """Overwrite the middle of a sample's image or text; its shard's name and the member's offset."""
    config = config_for(root)
    location = SourceIndex.open(root / "mixed", text_rule(config), name="mixed").locate(key_row)
    member = location.images[0] if image else location.text
    with open(location.shard, "r+b") as file:
        file.seek(member.offset + member.size // 2)
        file.write(b"\xff" * 4)
    return Path(location.shard).name, member.offset


def problems_of(root: Path) -> list[str]:
    return list(folder_problems("mixed", root / "mixed", config_for(root)))


def test_whole_data_have_no_problems(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    verify(config_for(root))
    assert "all samples decode" in capsys.readouterr().out


@pytest.mark.parametrize("image", [True, False])
def test_damage_is_named_by_shard_key_and_byte(root: Path, image: bool) -> None:
    shard, offset = damage(root, 2, image=image)
    assert shard == "shard-000001.tar"
    problems = problems_of(root)
    assert len(problems) == 2
    assert "shard-000001.tar differs from its index: sha256" in problems[0]
    assert "shard-000001.tar" in problems[1] and "'c'" in problems[1] and f"at byte {offset}" in problems[1]


def test_all_problems_are_listed_and_counted(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damage(root, 1, image=True)
    damage(root, 3, image=True)
    with worker_pool(1) as pool, pytest.raises(UserError, match="4 problems"):
        verify(config_for(root), partial(in_order, pool, shard_problems))
    printed = capsys.readouterr().out
    for words in ("sample 'b'", "sample 'd'", "shard-000000.tar differs", "shard-000001.tar differs"):
        assert words in printed


def test_results_come_in_order_and_tasks_are_made_when_they_are_due() -> None:
    made = 0

    def tasks() -> Iterator[int]:
        nonlocal made
        for task in range(3 * MAX_WAITING_TASKS):
            made = task + 1
            yield task

    with ThreadPoolExecutor(3) as pool:
        for place, result in enumerate(in_order(pool, str, tasks())):
            assert result == str(place) and made <= place + MAX_WAITING_TASKS
    assert made == 3 * MAX_WAITING_TASKS


def test_missing_shard_is_a_problem(root: Path) -> None:
    (root / "mixed" / "shard-000001.tar").unlink()
    (problem,) = problems_of(root)
    assert "shard-000001.tar" in problem and "missing" in problem
