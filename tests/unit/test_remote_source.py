"""A source behind an address gives the same steps as the folder that it serves."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch

from megatron_vl.config.data import AccessConfig
from megatron_vl.config.errors import UserError
from megatron_vl.data.index import SourceIndex
from megatron_vl.data.indexing import build_index
from megatron_vl.data.loader import ContentRule, LoadedStep, Loader
from megatron_vl.data.plan import Planner
from megatron_vl.data.source_table import source_table
from megatron_vl.data.storage.folder import AccessRule
from megatron_vl.data.types import MULTIMODAL
from megatron_vl.data.units import IndexedUnits
from tests.support.file_server import FileServer, serving
from tests.support.plans import plan_settings
from tests.support.tiny_data import mixed_samples, write_source
from tests.support.tiny_loader import ALL, PACKED, LoaderSetup

STEPS = 6
PLAN = plan_settings(
    sources={"pages": 1.0}, text_ratio=0.0, text_warmup_fraction=0.0, sequence_length=PACKED.sequence_length
)


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> ContentRule:
    return LoaderSetup(tmp_path_factory.mktemp("rules")).content


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, content: ContentRule) -> Path:
    folder = tmp_path_factory.mktemp("source")
    write_source(folder, mixed_samples(40), max_samples=7)
    build_index(folder, content.text, max_sample_bytes=100_000)
    return folder


@pytest.fixture
def server(folder: Path) -> Iterator[FileServer]:
    with serving({f"/pages/{path.name}": path.read_bytes() for path in folder.iterdir()}) as state:
        yield state


def access(**values: object) -> AccessRule:
    return AccessRule.of(replace(AccessConfig(backoff_seconds=0.01, timeout_seconds=5.0), **values))  # type: ignore[arg-type]


def steps(url: str, content: ContentRule, rule: AccessRule) -> list[LoadedStep]:
    index = SourceIndex.open(url, content.text, name="pages", access=rule, check_shards=False)
    planner = Planner({"pages": source_table(index, MULTIMODAL, content.image_tokens)}, PLAN)
    reader = IndexedUnits({"pages": index}, content, PACKED.sequence_length, ALL)
    with Loader(planner, reader, content, PACKED, ALL) as loader:
        return list(islice(loader, STEPS))


@pytest.mark.parametrize("fetch", ["ranges", "shards"])
def test_steps_are_those_of_the_folder(
    folder: Path, server: FileServer, content: ContentRule, fetch: str, tmp_path: Path
) -> None:
    near = steps(str(folder), content, access())
    server.faults.extend(["503", "", "cut", "", "reset"])
    far = steps(f"{server.url}/pages", content, access(fetch=fetch, cache=str(tmp_path / "cache")))
    for one, other in zip(near, far, strict=True):
        assert one.plan == other.plan
        for left, right in zip(one.microbatches, other.microbatches, strict=True):
            for name in ("tokens_1S", "labels_1S", "loss_mask_1S", "images_NCHW"):
                assert torch.equal(getattr(left, name), getattr(right, name))
    used = [sum(step.traffic.bytes_used for step in of) for of in (near, far)]
    assert used[0] == used[1] > 0
    assert sum(step.traffic.bytes_fetched for step in far) > used[1]


def test_a_shard_that_is_gone_ends_the_run_by_name(server: FileServer, content: ContentRule) -> None:
    for name in [name for name in server.files if name.endswith(".tar")]:
        del server.files[name]
    with pytest.raises(UserError, match=rf"{server.url}/pages/shard-00000\d.tar"):
        steps(f"{server.url}/pages", content, access())
