"""What a row says of speed, against counts by hand and planning's own."""

from dataclasses import replace

import pytest

from megatron_vl.config.cluster import ClusterConfig
from megatron_vl.config.root import PretrainConfig
from megatron_vl.config.train import PARTS, StageConfig, TrainConfig
from megatron_vl.data.loader import LoadedStep
from megatron_vl.data.shard_reader import NO_TRAFFIC
from megatron_vl.data.types import StepPlan
from megatron_vl.device.machine import Device, MemoryUse
from megatron_vl.planning.forecast import mean_flops
from megatron_vl.planning.topology import Topology
from megatron_vl.planning.useful import useful_flops
from megatron_vl.planning.workload import Workload
from megatron_vl.train.fullest import Fullest
from megatron_vl.train.meter import Meter
from megatron_vl.train.settings import StageSettings
from megatron_vl.train.step import StepResult
from tests.support.training import tiny_model

MODEL = tiny_model()
CLUSTER = ClusterConfig(device_type="cpu", peak_flops=2e12, peak_flops_fp32=1e12)
CONFIG = PretrainConfig(model=MODEL, cluster=CLUSTER, train=TrainConfig(precision="fp32"))
STAGE = StageSettings(
    name="joint",
    values=StageConfig(train=["adaptor", "decoder"], sources={"pages": 1.0, "text": 1.0}),
    parallel=CONFIG.parallel,
    topology=Topology(world_size=4),
    layout="EttttL",
    first_global_step=11,
)
HELD = MemoryUse(host_bytes=2**30, device_peak_bytes=2**32, device_reserved_bytes=2**33)
LOADED = LoadedStep(
    plan=StepPlan(step=3, modality="mixed", text_ratio=0.5, text_share=0.25, packs=(), group=0, digest=0),
    microbatches=[],
    wait_seconds=0.5,
    traffic=NO_TRAFFIC,
)
RESULT = StepResult(
    loss=2.0,
    gradient_norm=1.0,
    num_tokens=1000,
    num_supervised_tokens=900,
    num_samples=9,
    num_failed_samples=0,
    num_images=6,
    num_pairs=50_000.0,
    loss_by_source={"pages": 2.5, "text": 1.0},
    num_tokens_by_source={"pages": 600, "text": 400},
    bytes_fetched=1,
    bytes_used=1,
    stop_requested=False,
    saving=False,
    skipped=False,
    seconds=1.5,
    straggler=None,
    fullest=Fullest(rank=3, memory=HELD),
    corrupted=[],
)
MODALITY = {"pages": "multimodal", "text": "text"}


def meter(config: PretrainConfig = CONFIG, kind: str = "cpu") -> Meter:
    return Meter.of(config, STAGE, MODALITY, Device(kind))  # type: ignore[arg-type]


def test_rates_are_per_second_of_the_step_with_its_wait() -> None:
    row = meter().row(LOADED, RESULT, learning_rate=0.25)
    assert (row.step, row.global_step, row.step_seconds, row.learning_rate) == (3, 13, 2.0, 0.25)
    assert (row.tokens_per_second, row.images_per_second) == (500.0, 3.0)
    assert row.tokens_per_second_by_modality == {"multimodal": 300.0, "text": 200.0}
    assert (row.fullest_rank, row.host_memory_bytes, row.device_reserved_bytes) == (3, 2**30, 2**33)


def test_useful_flops_count_the_decoders_products_by_hand() -> None:
    language = MODEL.language
    hidden, ffn = language.hidden_size, language.ffn_hidden_size
    products = language.num_layers * (4 * hidden**2 + 3 * hidden * ffn) + hidden * language.vocab_size
    flops = useful_flops(MODEL, frozenset({"decoder"}))
    assert flops.per_token == 3 * 2 * products
    assert flops.per_pair == 3 * language.num_layers * 4 * hidden
    row = meter().row(LOADED, RESULT, 0.0)
    counted = flops.language(1000, 50_000)
    assert row.mfu == pytest.approx(counted / (2.0 * 4 * 1e12))
    assert row.mfu_with_vision is not None and row.mfu_with_vision > row.mfu


def test_a_step_as_planned_has_the_flops_of_planning() -> None:
    workload = Workload(
        stage="joint",
        trained=frozenset(PARTS),
        num_steps=1,
        global_batch_size=8,
        sequence_length=256,
        text_ratio=0.0,
        images_per_row=3.0,
        max_images_per_row=3,
        tokens_per_row=200.0,
        segment_tokens=200.0,
    )
    flops = useful_flops(MODEL, workload.trained)
    assert mean_flops(MODEL, workload) == (flops.language(8 * 200, 8 * 200**2 / 2), flops.vision(8 * 3))


def test_frozen_towers_cost_their_forward_pass_alone() -> None:
    frozen, trained = (useful_flops(MODEL, frozenset(parts)).per_image for parts in (("adaptor",), PARTS))
    assert 2.5 < trained / frozen < 3.5


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        (replace(CONFIG, cluster=replace(CLUSTER, peak_flops_fp32=0.0)), "cpu"),
        (replace(CONFIG, cluster=replace(CLUSTER, device_type="cuda")), "cpu"),
    ],
)
def test_without_a_known_peak_there_is_no_utilisation(config: PretrainConfig, kind: str) -> None:
    row = meter(config, kind).row(LOADED, RESULT, 0.0)
    assert row.mfu is None and row.mfu_with_vision is None


def test_precision_decides_on_the_peak() -> None:
    bf16 = replace(CONFIG, train=TrainConfig(precision="bf16"))
    fp32_row, bf16_row = (meter(config).row(LOADED, RESULT, 0.0) for config in (CONFIG, bf16))
    assert fp32_row.mfu == pytest.approx(2 * (bf16_row.mfu or 0.0))
