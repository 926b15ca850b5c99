"""Our loader over the photographs: index, plan, read, tokenise, decode, microbatches. A side of `benchmarks.loaders`.

Prints what a sample costs as JSON: milliseconds of CPU, of all threads, and of time.
"""

import json
import time
from argparse import ArgumentParser
from pathlib import Path

import torch

from benchmarks.photographs import BOS, EOS, IMAGE
from megatron_vl.config.data import DataConfig, SourceConfig
from megatron_vl.config.model import LanguageConfig, ModelConfig, SamConfig, SiglipConfig, VisionConfig
from megatron_vl.config.parallel import ParallelConfig
from megatron_vl.config.root import PretrainConfig
from megatron_vl.config.train import StageConfig
from megatron_vl.data.indexing import build_index
from megatron_vl.data.loader import Loader, LoadingRule, Role, UnitContent
from megatron_vl.data.plan import Planner
from megatron_vl.data.types import Unit
from megatron_vl.data.units import IndexedUnits
from megatron_vl.planning.topology import Topology
from megatron_vl.train.plan_settings import plan_settings
from megatron_vl.train.settings import StageSettings
from megatron_vl.train.sources import Sources, open_sources, row_rule, text_rule

NAME, WARM_UP_STEPS, ROWS_PER_STEP = "photographs", 2, 4
EVERYTHING = Role(reads_tokens=True, reads_images=True, reads_labels=True)
MODEL = ModelConfig(
    language=LanguageConfig(vocab_size=2048), vision=VisionConfig(siglip=SiglipConfig(), sam=SamConfig())
)
STAGE = StageSettings(
    name="joint",
    values=StageConfig(
        steps=10**6,
        global_batch_size=ROWS_PER_STEP,
        sequence_length=4096,
        packing=True,
        sources={NAME: 1.0},
    ),
    parallel=ParallelConfig(),
    topology=Topology(world_size=1),
    layout="EL",
    first_global_step=1,
)


class CountingUnits(IndexedUnits):
    """A reader that counts what it read."""

    num_units = 0

    def read(self, unit: Unit, images: range) -> UnitContent:
        content = super().read(unit, images)
        self.num_units += 1
        return content


def data_config(folder: Path) -> DataConfig:
    """The photographs as a data set."""
    return DataConfig(
        name=NAME,
        sources={NAME: SourceConfig(path=str(folder / "shards"), modality="multimodal")},
        tokenizer=str(folder / "tokenizer.json"),
        bos_token=BOS,
        eos_token=EOS,
        image_token=IMAGE,
    )


def open_photographs(folder: Path) -> Sources:
    """The photographs, indexed anew."""
    data = data_config(folder)
    build_index(folder / "shards", text_rule(data, MODEL), max_sample_bytes=data.max_sample_bytes)
    return open_sources(data, MODEL, [STAGE])


def cost(folder: Path, num_threads: int, num_steps: int) -> dict[str, float]:
    """Milliseconds a sample. Samples that were read ahead and never asked for count too."""
    sources, rows = open_photographs(folder), row_rule(STAGE)
    config = PretrainConfig(model=MODEL, data=data_config(folder))
    planner = Planner(sources.tables(), plan_settings(config, STAGE, sources))
    reader = CountingUnits(sources.training, sources.content, rows.sequence_length, EVERYTHING)
    rule = LoadingRule(num_threads=num_threads)

    def run(count: int) -> int:
        before = reader.num_units
        with Loader(planner, reader, sources.content, rows, EVERYTHING, rule) as loader:
            for _ in range(count):
                next(loader)
        return reader.num_units - before

    run(WARM_UP_STEPS)
    begun, began = time.process_time(), time.perf_counter()
    num_units = run(num_steps)
    cpu_seconds, seconds = time.process_time() - begun, time.perf_counter() - began
    return {"cpu_ms": cpu_seconds * 1e3 / num_units, "wall_ms": seconds * 1e3 / num_units}


def main() -> None:
    parser = ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("num_threads", type=int)
    parser.add_argument("num_steps", type=int)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(json.dumps(cost(options.folder, options.num_threads, options.num_steps)))


if __name__ == "__main__":
    main()
