"""Host memory does not grow with the number of batches."""

from pathlib import Path

import psutil
import pytest

from megatron_vl.data.index import SourceIndex
from megatron_vl.data.indexing import build_index
from megatron_vl.data.loader import Loader, LoadingRule
from megatron_vl.data.plan import Planner
from megatron_vl.data.source_table import source_table
from megatron_vl.data.types import MULTIMODAL
from megatron_vl.data.units import IndexedUnits
from tests.support.plans import plan_settings
from tests.support.tiny_data import mixed_samples, write_source
from tests.support.tiny_loader import ALL, PACKED, LoaderSetup

NUM_BATCHES, WARM_UP, MAX_GROWTH_BYTES = 20_000, 2_000, 8_000_000


@pytest.mark.soak
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("workers", [0, 4])
def test_memory_is_flat_over_many_batches(
    workers: int, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Some thousand epochs of sixty shards: indexes, shards and windows come and go."""
    content = LoaderSetup(tmp_path_factory.mktemp("rules")).content
    folder = tmp_path / "source"
    write_source(folder, mixed_samples(300), max_samples=5)
    build_index(folder, content.text, max_sample_bytes=100_000)
    index = SourceIndex.open(folder, content.text, name="pages")
    settings = plan_settings(
        sources={"pages": 1.0},
        text_ratio=0.0,
        text_warmup_fraction=0.0,
        sequence_length=PACKED.sequence_length,
        global_batch_size=4,
        flush_steps=64,
    )
    planner = Planner({"pages": source_table(index, MULTIMODAL, content.image_tokens)}, settings)
    reader = IndexedUnits({"pages": index}, content, PACKED.sequence_length, ALL)
    process, seen = psutil.Process(), []
    with Loader(planner, reader, content, PACKED, ALL, LoadingRule(num_threads=workers)) as loader:
        for number, _ in zip(range(NUM_BATCHES), loader, strict=False):
            if number % 1000 == 0 and number >= WARM_UP:
                seen.append(process.memory_info().rss)
    assert max(seen) - seen[0] < MAX_GROWTH_BYTES, seen
