"""The search ends at the best of what is permitted and fits; where nothing does, it says what would."""

from dataclasses import replace

import numpy as np
import pytest

from megatron_vl.config.cluster import ClusterConfig
from megatron_vl.config.errors import UserError
from megatron_vl.config.plan import SearchConfig
from megatron_vl.planning.candidate import Candidate, Problem
from megatron_vl.planning.forecast import forecast, mean_flops
from megatron_vl.planning.grids import Grids
from megatron_vl.planning.layout import even_layout, resolve_layout
from megatron_vl.planning.memory import Execution
from megatron_vl.planning.search import auto_layout, search
from megatron_vl.planning.setting import Setting
from megatron_vl.planning.topology import Topology, check_batch_sizes, check_tensor_size
from megatron_vl.planning.workload import Workload
from tests.support.clusters import cluster_of, model_of

WORKLOAD = Workload(
    stage="joint",
    trained=frozenset({"adaptor", "embedding", "decoder", "head"}),
    num_steps=1000,
    global_batch_size=2304,
    sequence_length=4096,
    text_ratio=0.7,
    images_per_row=5.0,
    max_images_per_row=7,
    tokens_per_row=4096,
    segment_tokens=4096,
)
SMALL = replace(WORKLOAD, global_batch_size=8)
FREE = SearchConfig()


def nodes(num_nodes: int, devices_per_node: int, memory_share: float = 1.0) -> ClusterConfig:
    cluster = cluster_of("a100_64x8")
    cluster.num_nodes, cluster.devices_per_node = num_nodes, devices_per_node
    cluster.memory_bytes = int(memory_share * cluster.memory_bytes)
    return cluster


def problem(cluster: ClusterConfig, workload: Workload = WORKLOAD, num_layers: int = 30) -> Problem:
    model = model_of("deepseek_vl_7b")
    model = replace(model, language=replace(model.language, num_layers=num_layers))
    return Problem(model=model, workload=workload, cluster=cluster, execution=Execution())


def candidates(case: Problem) -> list[Candidate]:
    grids = Grids(model=case.model, workload=case.workload, cluster=case.cluster, kept=FREE)
    return [Candidate(case, setting) for group in grids.settings() for setting in group]


@pytest.mark.parametrize("memory_share", [1.0, 0.2])
def test_no_permitted_setting_that_fits_is_faster(memory_share: float) -> None:
    """The whole space of a small cluster, without bounds and dominance."""
    case = problem(nodes(2, 2, memory_share), SMALL, num_layers=4)
    everything = []
    for candidate in candidates(case):
        counts = candidate.best_split()
        if counts is not None:
            everything.append(candidate.seconds(counts))
    found = search(case, FREE, top=3)
    assert found[0].step_seconds <= 1.0001 * min(everything)
    assert found == sorted(found, key=lambda each: each.step_seconds)
    for each in found:
        topology = each.setting.topology
        assert each.peak_memory_bytes <= case.memory_bytes
        assert topology.world_size == 4 and 2 % topology.tensor_size == 0
        check_tensor_size(case.model.language, topology.tensor_size, each.setting.sequence_parallel)
        check_batch_sizes(8, each.setting.micro_batch_size, topology, "joint")
        assert resolve_layout(each.setting.layout, 4, topology) == each.setting.layout


def test_bounds_are_bounds() -> None:
    for candidate in candidates(problem(nodes(1, 4), SMALL, num_layers=6))[::9]:
        counts = candidate.best_split() or candidate.even_split(candidate.unlimited)
        assert counts is not None and candidate.bound <= candidate.seconds(counts)


def test_what_is_kept_stays() -> None:
    kept = SearchConfig(
        tensor_size=2,
        pipeline_size=2,
        virtual_size=1,
        micro_batch_size=2,
        recompute="full",
        vision_placement="split",
        layout="E" + "t" * 15 + "|" + "t" * 15 + "L",
    )
    (found,) = search(problem(nodes(1, 8)), kept)
    setting, topology = found.setting, found.setting.topology
    assert (topology.tensor_size, topology.pipeline_size, topology.virtual_size) == (2, 2, 1)
    assert (setting.micro_batch_size, setting.recompute, setting.vision_placement) == (2, "full", "split")
    assert setting.layout == kept.layout


def test_a_forecast_adds_up() -> None:
    case = problem(nodes(64, 8))
    kept = SearchConfig(tensor_size=2, pipeline_size=2, virtual_size=3, micro_batch_size=1)
    best = search(case, kept, top=1)[0]
    text, multimodal = best.steps["text"], best.steps["multimodal"]
    assert best.step_seconds == pytest.approx(0.7 * text.seconds + 0.3 * multimodal.seconds)
    assert best.days == pytest.approx(best.step_seconds * 1000 / 86400)
    flops = 2304 * 4096 * 3 * 13.99e9  # the paper's arithmetic
    assert best.mfu == pytest.approx(flops / (best.step_seconds * 512 * 312e12), rel=2e-3)
    images = 2304 * 5 * 0.3 * (0.381 + 0.999 + 3 * 0.024) * 1e12
    assert best.mfu_with_vision / best.mfu == pytest.approx(1 + images / flops, rel=5e-3)
    assert multimodal.seconds > text.seconds and 0 < best.bubble_fraction < 0.05


def test_the_paper_model_is_planned_as_was_found_beforehand() -> None:
    """512 A100: spread beats split beats replicated, a chosen split an even one, by what was simulated beforehand."""
    seconds = {}
    for placement in ("spread", "split", "replicated"):
        kept = SearchConfig(
            tensor_size=2, pipeline_size=2, virtual_size=3, micro_batch_size=1, vision_placement=placement
        )
        seconds[placement] = search(problem(nodes(64, 8)), kept, top=1)[0].step_seconds
    assert seconds["spread"] < seconds["split"] < seconds["replicated"] < 1.10 * seconds["spread"]
    setting = setting_of(vision_placement="replicated")
    even = replace(setting, layout=even_layout(30, setting.topology))
    steps = Candidate(problem(nodes(64, 8)), even).steps
    assert forecast(steps, even, Execution()).step_seconds > 1.015 * seconds["replicated"]


def setting_of(**values: object) -> Setting:
    topology = Topology(world_size=512, tensor_size=2, pipeline_size=2, virtual_size=3)
    chosen = Setting(topology=topology, layout="", sequence_parallel=True, micro_batch_size=1)
    return replace(chosen, **values)  # type: ignore[arg-type]


def test_an_automatic_layout_is_the_best_split() -> None:
    case = problem(nodes(64, 8))
    layout = auto_layout(case, setting_of(layout="ignored"))
    chosen = replace(setting_of(), layout=layout)
    even = replace(setting_of(), layout=even_layout(30, chosen.topology))
    steps = Candidate(case, setting_of()).steps
    assert resolve_layout(layout, 30, chosen.topology) == layout
    ours, theirs = (forecast(steps, one, Execution()).step_seconds for one in (chosen, even))
    assert ours < theirs


def test_replicas_of_differing_loads_take_as_long_as_the_slowest() -> None:
    steps = Candidate(problem(nodes(64, 8)), setting_of()).steps
    kind = next(kind for kind in steps.kinds if kind.name == "multimodal")
    split = np.array([[4, 6, 6, 6, 6, 2]]).T
    alike = steps.of_kind(kind, split).seconds[0]
    images = np.random.default_rng(1).poisson(5, (18, 128)).astype(float)
    replicas = steps.replay(images, np.repeat(split, 128, axis=1)).seconds
    assert replicas.max() > alike and replicas.min() < replicas.max()
    same = steps.replay(np.full((18, 3), 5.0), np.repeat(split, 3, axis=1)).seconds
    np.testing.assert_allclose(same, alike)
    fullest = images.sum(0).argmax()
    assert replicas[fullest] >= np.median(replicas)


@pytest.mark.parametrize(
    ("kept", "num_nodes", "parts"),
    [
        (
            SearchConfig(tensor_size=2, pipeline_size=2),
            512,
            ["2304", "1024 data-parallel", "2 x 8", "2048 or 3072", "3072 or 4608 devices"],
        ),
        (SearchConfig(tensor_size=3), 64, ["tensor_size=3", "devices_per_node=8", "num_heads=32", "2 x 2"]),
        (SearchConfig(pipeline_size=64), 64, ["pipeline_size=64", "num_layers + 2 = 32"]),
        (
            SearchConfig(tensor_size=2, pipeline_size=2, micro_batch_size=4),
            64,
            ["micro_batch_size=4", "512", "2048 or 2560"],
        ),
        (
            SearchConfig(tensor_size=1, pipeline_size=4, virtual_size=2, micro_batch_size=9),
            64,
            ["2 microbatches are too few to interleave", "pipeline_size=4", "4608"],
        ),
    ],
)
def test_what_does_not_divide_is_refused_with_what_does(
    kept: SearchConfig, num_nodes: int, parts: list[str]
) -> None:
    with pytest.raises(UserError) as error:
        search(problem(nodes(num_nodes, 8)), kept)
    assert [part for part in parts if part not in str(error.value)] == []


def test_what_memory_forbids_is_refused_with_what_it_allows() -> None:
    kept = SearchConfig(tensor_size=1, pipeline_size=1)
    case = problem(nodes(1, 8, 0.6), SMALL)
    with pytest.raises(UserError, match=r"too little memory: .* GiB or more, and may use 44\.2 .* = 1 x 2, "):
        search(case, kept)
    with pytest.raises(UserError, match="take more devices or a smaller model"):
        search(problem(nodes(1, 1), SMALL), FREE)


def test_too_many_chunks_for_a_layout_are_refused() -> None:
    topology = Topology(world_size=512, tensor_size=1, pipeline_size=16, virtual_size=3)
    with pytest.raises(UserError, match="num_layers=30 cannot fill"):
        auto_layout(problem(nodes(64, 8)), setting_of(topology=topology))


def test_useful_work_of_the_paper_models() -> None:
    for name, per_token in (("deepseek_vl_1b", 3.29e9), ("deepseek_vl_7b", 13.99e9)):
        language, _ = mean_flops(model_of(name), WORKLOAD)
        assert language / (2304 * 4096) == pytest.approx(3 * per_token, rel=2e-3)
