"""Ranks of worlds that do not exist: built without data, and compared with what planning says of them."""

from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace

import pytest
from omegaconf import OmegaConf

from megatron_vl.config.errors import UserError
from megatron_vl.config.model import ModelConfig
from megatron_vl.measure.verify import RankReport, planned_groups, verify_rank
from megatron_vl.planning.layout import resolve_layout
from megatron_vl.planning.setting import Setting
from megatron_vl.planning.topology import Topology
from megatron_vl.planning.workload import Workload
from tests.support.ranks import _CONTEXT
from tests.support.training import MODEL_CONFIGS, tiny_model

JOINT = frozenset({"adaptor", "embedding", "decoder", "head"})
NUM_PARAMETERS_7B = 7_331_390_721
TINY = Topology(world_size=16, tensor_size=2, pipeline_size=2, virtual_size=2)


def workload(topology: Topology, num_tokens: int, num_images: int) -> Workload:
    return Workload(
        stage="joint",
        trained=JOINT,
        num_steps=1,
        global_batch_size=18 * topology.data_size if topology.virtual_size == 1 else 24 * topology.data_size,
        sequence_length=num_tokens,
        text_ratio=0.0,
        images_per_row=num_images,
        max_images_per_row=num_images,
        tokens_per_row=num_tokens,
        segment_tokens=num_tokens,
    )


def setting(model: ModelConfig, topology: Topology, layout: str | None = None, **values: str) -> Setting:
    return Setting(
        topology=topology,
        layout=resolve_layout(layout, model.language.num_layers, topology),
        sequence_parallel=topology.tensor_size > 1,
        micro_batch_size=1,
        **values,  # type: ignore[arg-type]
    )


def verify_all(
    model: ModelConfig, work: Workload, chosen: Setting, precision: str, ranks: list[int]
) -> list[RankReport]:
    return [verify_rank(model, work, chosen, precision, rank) for rank in ranks]


def verified(
    model: ModelConfig, work: Workload, chosen: Setting, precision: str, ranks: list[int]
) -> list[RankReport]:
    """In a process of its own, which joins no other process group."""
    with ProcessPoolExecutor(1, mp_context=_CONTEXT) as pool:
        return pool.submit(verify_all, model, work, chosen, precision, ranks).result(timeout=280)


def seven_billion() -> ModelConfig:
    merged = OmegaConf.merge(
        OmegaConf.structured(ModelConfig), OmegaConf.load(MODEL_CONFIGS / "deepseek_vl_7b.yaml")
    )
    model: ModelConfig = OmegaConf.to_object(merged)  # type: ignore[assignment]
    return model


def test_ranks_of_the_tiny_model_are_as_planned() -> None:
    model = tiny_model()
    first, last = verified(model, workload(TINY, 1024, 6), setting(model, TINY), "bf16", [0, 15])
    assert (first.tensor_rank, first.data_rank, first.pipeline_rank) == (0, 0, 0)
    assert (last.tensor_rank, last.data_rank, last.pipeline_rank) == (1, 3, 1)
    assert first.layers == ((1,), (3,)) and last.layers == ((2,), (4,))


@pytest.mark.parametrize("placement", [pytest.param("split", marks=pytest.mark.slow), "spread"])
def test_ranks_of_other_placements_are_as_planned(placement: str) -> None:
    model = tiny_model()
    chosen = setting(model, TINY, vision_placement=placement)
    _, last = verified(model, workload(TINY, 1024, 20), chosen, "fp32", [1, 15])
    copies = last.held.parameters - 4 * last.num_parameters
    assert (copies > 0) == (placement == "spread")


def test_a_difference_is_told() -> None:
    """The layer split of the process that builds is not the one that is planned for."""
    model = tiny_model()
    topology = Topology(world_size=8, tensor_size=2, pipeline_size=2)
    chosen = setting(model, topology, layout="Et|tttL")
    with ProcessPoolExecutor(1, mp_context=_CONTEXT) as pool:
        failure = pool.submit(_verify_another_layout, model, topology, chosen).exception(timeout=100)
    assert isinstance(failure, RuntimeError)
    assert "rank 4 of 8 is not as planned" in str(failure)
    assert "chunk 1 holds layers (2, 3, 4), planned (4,)" in str(failure)


def _verify_another_layout(model: ModelConfig, topology: Topology, chosen: Setting) -> None:
    from megatron_vl.measure import verify

    built = verify.run_rank_step
    verify.run_rank_step = lambda one, work, _, *rest: built(one, work, chosen, *rest)  # type: ignore[assignment]
    planned = replace(chosen, layout="Ettt|tL")
    verify_rank(model, workload(topology, 256, 0), planned, "bf16", 4)


def test_there_is_no_such_rank() -> None:
    model = tiny_model()
    with pytest.raises(UserError, match="0 to 15"):
        verify_rank(model, workload(TINY, 256, 0), setting(model, TINY), "bf16", 16)


@pytest.mark.parametrize("topology", [TINY, Topology(world_size=24, tensor_size=2, pipeline_size=3)])
def test_planned_groups_divide_the_world(topology: Topology) -> None:
    """Every kind of group covers all ranks once, and its ranks agree on it."""
    sizes = {
        "tensor": topology.tensor_size,
        "data": topology.data_size,
        "pipeline": topology.pipeline_size,
        "model": topology.model_size,
    }
    for kind, size in sizes.items():
        groups = [tuple(planned_groups(topology, rank)[kind]) for rank in range(topology.world_size)]
        assert all(rank in group and len(group) == size for rank, group in enumerate(groups))
        assert sorted(rank for group in set(groups) for rank in group) == list(range(topology.world_size))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("topology", "ranks", "placement"),
    [
        (Topology(world_size=512, tensor_size=2, pipeline_size=2, virtual_size=3), [0, 511], "replicated"),
        (Topology(world_size=512, tensor_size=1, pipeline_size=2), [300], "spread"),
        (Topology(world_size=4096, tensor_size=2, pipeline_size=4), [0, 2049, 4095], "split"),
    ],
)
def test_ranks_of_a_cluster(topology: Topology, ranks: list[int], placement: str) -> None:
    model = seven_billion()
    chosen = setting(model, topology, vision_placement=placement)
    for report in verified(model, workload(topology, 4096, 5), chosen, "bf16", ranks):
        print(report)


@pytest.mark.slow
def test_the_ranks_of_a_replica_hold_the_whole_model() -> None:
    model = seven_billion()
    topology = Topology(world_size=512, pipeline_size=4)
    ranks = [0, 128, 256, 384]
    reports = verified(model, workload(topology, 1024, 1), setting(model, topology), "bf16", ranks)
    assert sum(report.num_parameters for report in reports) == NUM_PARAMETERS_7B
    layers = [layer for report in reports for chunk in report.layers for layer in chunk]
    assert layers == list(range(1, 31))
