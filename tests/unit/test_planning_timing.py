"""Seconds of units, chunks and steps: from work and speed by hand, and how settings compare."""

from dataclasses import replace
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_vl.config.parallel import VISION_PLACEMENTS
from megatron_vl.planning.chunk_times import ChunkTimes
from megatron_vl.planning.cost import UNITS, CostModel
from megatron_vl.planning.passes import adaptor_units, chunk_units, encoder_units
from megatron_vl.planning.setting import Setting
from megatron_vl.planning.step_times import StepTimes
from megatron_vl.planning.timing import ClusterTiming, PassSeconds
from megatron_vl.planning.topology import Topology
from megatron_vl.planning.workload import Load
from tests.support.clusters import cluster_of, model_of

MODEL = model_of("deepseek_vl_7b")
A100 = cluster_of("a100_64x8")
JOINT = frozenset({"adaptor", "embedding", "decoder", "head"})
SFT = JOINT | {"siglip"}
TEXT = Load(num_tokens=4096, num_images=0, num_pairs=4096**2 / 2)
WITH_IMAGES = replace(TEXT, num_images=5)
LAYOUT = "Etttt|tttttt|tttttt|tttttt|tttttt|ttL"


class OneSecond:
    """A Timing by which every pass over a unit of the decoder takes a second, and over one of vision a second an
    image; weight gradients take two."""

    def unit(self, name: str, load: Load) -> PassSeconds:
        seconds = load.num_images if name in {**encoder_units(MODEL), **adaptor_units(MODEL)} else 1.0
        return PassSeconds(forward=seconds, input_gradient=seconds, weight_gradient=2 * seconds)


def setting(placement: str = "replicated", tensor_size: int = 2, **values: object) -> Setting:
    chosen = Setting(
        topology=Topology(world_size=512, tensor_size=tensor_size, pipeline_size=2, virtual_size=3),
        layout=LAYOUT,
        sequence_parallel=tensor_size > 1,
        micro_batch_size=1,
        vision_placement=placement,
    )
    return replace(chosen, **values)  # type: ignore[arg-type]


def times(chosen: Setting, trained: frozenset[str] = JOINT, cluster_timing: bool = False) -> ChunkTimes:
    """With free communication unless `cluster_timing`."""
    costs = CostModel(model=MODEL, tensor_size=chosen.topology.tensor_size, sequence_parallel=True)
    link = replace(A100.inside, bytes_per_second=1e30, latency_seconds=0.0)
    return ChunkTimes(
        model=MODEL,
        trained=trained,
        setting=chosen,
        timing=ClusterTiming(cluster=A100, costs=costs) if cluster_timing else OneSecond(),
        cluster=A100 if cluster_timing else replace(A100, inside=link, between=link, chunk_seconds=0.0),
    )


def test_a_unit_takes_its_work_at_the_speeds_of_its_kinds() -> None:
    costs = CostModel(model=MODEL)
    timing = ClusterTiming(cluster=A100, costs=costs)
    layer = costs.unit("decoder_layer", TEXT).forward
    by_hand = layer.matmul_flops / (0.72 * 312e12) + layer.attention_flops / (0.5 * 312e12)
    by_hand += layer.moved_bytes / (0.8 * 2.039e12)
    assert timing.unit("decoder_layer", TEXT).forward == pytest.approx(by_hand)
    block = costs.unit("siglip_block", WITH_IMAGES).forward
    by_hand = block.flops / (0.6 * 312e12) + block.moved_bytes / (0.8 * 2.039e12)
    assert timing.unit("siglip_block", WITH_IMAGES).forward == pytest.approx(by_hand)


def test_towers_reach_the_share_of_peak_that_the_file_claims_for_them() -> None:
    """All in, by the FLOPs that the model needs: positions folded for flash attention are more, and do not count."""
    timing = ClusterTiming(cluster=A100, costs=CostModel(model=MODEL))
    needed = CostModel(model=MODEL, folded_positions=False)
    for tower, share in (("siglip", 1 / 2), ("sam", 1 / 3)):
        units = {name: n for name, n in encoder_units(MODEL).items() if name.startswith(tower)}
        seconds = sum(n * timing.unit(name, WITH_IMAGES).forward for name, n in units.items())
        flops = sum(n * needed.unit(name, WITH_IMAGES).forward.flops for name, n in units.items())
        assert flops / seconds / 312e12 == pytest.approx(share, abs=0.02)


@given(
    name=st.sampled_from(UNITS),
    divided=st.booleans(),
    exposed=st.floats(0, 1),
    speed=st.sampled_from([1e3, 1e6, 1e9, 1e12]),
)
def test_products_hide_no_more_than_they_last(name: str, divided: bool, exposed: float, speed: float) -> None:
    """Backward takes at least its work, and at most its work and all of its communication, at any speed of links."""
    slow = replace(A100.inside, bytes_per_second=speed)
    costs = CostModel(model=MODEL, tensor_size=4, sequence_parallel=divided)

    def backward(cluster_exposed: float, link: float) -> float:
        cluster = replace(A100, tensor_exposed=cluster_exposed, inside=replace(slow, bytes_per_second=link))
        seconds = ClusterTiming(cluster=cluster, costs=costs).unit(name, WITH_IMAGES)
        assert min(seconds.forward, seconds.input_gradient, seconds.weight_gradient) >= 0
        return seconds.input_gradient + seconds.weight_gradient

    latency = replace(slow, bytes_per_second=1e30)
    assert backward(exposed, speed) <= backward(1.0, speed) * (1 + 1e-9)
    assert backward(exposed, speed) >= backward(0.0, latency.bytes_per_second) * (1 - 1e-9)


@pytest.mark.parametrize(("trained", "load"), list(product((JOINT, SFT), (TEXT, WITH_IMAGES))))
def test_chunks_take_what_their_units_take(trained: frozenset[str], load: Load) -> None:
    whole = times(setting(), trained).chunk("E" + "t" * 30 + "L", load)
    parts = [times(setting(), trained).chunk(chunk, load) for chunk in LAYOUT.split("|")]
    assert whole.forward == pytest.approx(sum(part.forward for part in parts))
    assert whole.backward == pytest.approx(sum(part.backward for part in parts))
    images = load.num_images
    adaptor = 3  # two first layers and the rest
    assert parts[0].forward == pytest.approx(images * (sum(encoder_units(MODEL).values()) + adaptor) + 1 + 4)
    siglip = (2 + 24 * 3) * images if "siglip" in trained else 0.0  # the patches have no input gradient
    first_layers = (2 + (3 if "siglip" in trained else 2)) * images
    assert parts[0].backward == pytest.approx(siglip + first_layers + 3 * images + 3 + 4 * 3)


def test_frozen_weights_cost_no_gradient_but_their_input_s() -> None:
    adaptor_only = times(setting(), frozenset({"adaptor"}))
    assert adaptor_only.chunk("tt", TEXT).backward == 2  # rather than 2 * 3
    assert adaptor_only.chunk("L", TEXT).backward == 3  # norm, head, loss
    assert times(setting(), JOINT).chunk("L", TEXT).backward == 3 + 3 + 1


def test_recompute_adds_what_is_computed_again() -> None:
    kept = times(setting()).chunk("ttt", TEXT)
    for recompute in ("selective", "full"):  # core attention takes a second too
        again = times(setting(recompute=recompute)).chunk("ttt", TEXT)
        assert again.forward == kept.forward
        assert again.backward == kept.backward + 3
    real = [
        times(setting(recompute=recompute), cluster_timing=True).chunk("t", TEXT)
        for recompute in ("none", "selective", "full")
    ]
    again = real[0].forward - A100.chunk_seconds  # launched with the backward pass
    assert real[2].backward == pytest.approx(real[0].backward + again)
    assert real[0].backward < real[1].backward < real[2].backward
    towers = [
        times(setting(recompute_vision=again), SFT).chunk("E", WITH_IMAGES).backward
        for again in (False, True)
    ]
    # SigLIP's blocks but for their last product; SAM is frozen.
    assert 24 * 5 / 2 < towers[1] - towers[0] < 24 * 5


@pytest.mark.parametrize("images", [0, 1, 2, 5, 6])
def test_placements_share_the_encoding(images: int) -> None:
    load = replace(TEXT, num_images=images)
    chunks = {
        placement: times(setting(placement, tensor_size=4)).chunk("Et", load)
        for placement in VISION_PLACEMENTS
    }
    share = times(setting(tensor_size=4)).chunk("Et", replace(TEXT, num_images=-(-images // 4)))
    assert chunks["split"] == share
    text = times(setting(tensor_size=4)).chunk("Et", TEXT)
    assert chunks["spread"].forward == text.forward + 3 * images  # the adaptor stays
    assert chunks["replicated"].forward == text.forward + (3 + sum(encoder_units(MODEL).values())) * images


def test_spread_encodes_before_the_pipeline_and_trains_after_it() -> None:
    units = sum(encoder_units(MODEL).values())
    frozen = times(setting("spread")).encode(10)
    assert frozen.forward == 3 * units  # of four ranks
    assert frozen.backward == pytest.approx(0.0, abs=1e-9)
    trained = times(setting("spread"), SFT).encode(10)
    assert trained.forward == pytest.approx(frozen.forward)
    assert trained.backward == pytest.approx(3 * (25 + 2 + 24 * 3))  # SigLIP encodes again for its gradients
    for placement in ("replicated", "split"):
        nothing = times(setting(placement)).encode(10)
        assert (nothing.forward, nothing.backward) == (0, 0)


def test_spread_pays_for_its_messages() -> None:
    """Of the 7B model on 512 A100s: features to the first stage, and SigLIP's weights and gradients where it trains."""
    free, real = (
        replace(
            times(setting("spread"), SFT, cluster_timing=True),
            cluster=replace(A100, between=replace(A100.between, bytes_per_second=bandwidth)),
        ).encode(64)
        for bandwidth in (1e30, A100.between.bytes_per_second)
    )
    features = 32 * 576 * (1024 + 1024) * 2 / 2  # bytes: a column's images, of the other stage
    towers = 303_694_848
    each = A100.between.bytes_per_second / 8
    assert real.forward - free.forward == pytest.approx((features + towers * 2) / each, rel=0.01)
    assert real.backward - free.backward == pytest.approx((features / 2 + towers * 4) / each, rel=0.01)


def test_gradients_are_reduced_and_parameters_gathered_by_what_trains() -> None:
    topology = Topology(world_size=512, tensor_size=2, pipeline_size=2)
    timing = ClusterTiming(cluster=A100, costs=CostModel(model=MODEL, tensor_size=2))
    step = StepTimes(model=MODEL, trained=JOINT, topology=topology, cluster=A100, timing=timing)
    bandwidth = A100.between.bytes_per_second / 2
    layer = (4 * 4096**2 + 3 * 4096 * 11008) / 2 + 2 * 4096
    ring = 127 / 128 * layer * 6 / bandwidth
    latency = 127 * A100.between.latency_seconds
    assert step.reduce_seconds("t" * 6) == pytest.approx(4 * ring + latency)  # fp32
    assert step.gather_seconds("t" * 6) == pytest.approx(2 * ring + latency)  # bf16
    frozen = replace(step, trained=frozenset({"adaptor"}))
    assert frozen.reduce_seconds("t" * 6) == 0
    assert frozen.trained_parameters("Et") == 20_979_712
    assert (
        replace(step, topology=Topology(world_size=4, tensor_size=2, pipeline_size=2)).reduce_seconds("t")
        == 0
    )


def test_an_update_shrinks_with_the_shard() -> None:
    timing = ClusterTiming(cluster=A100, costs=CostModel(model=MODEL, tensor_size=2))
    assert 5 < timing.update(1e9, 1) / timing.update(1e9, 128) < 128
    topology = Topology(world_size=8)
    step = StepTimes(model=MODEL, trained=JOINT, topology=topology, cluster=A100, timing=timing)
    assert step.optimizer_seconds([]) == A100.step_seconds
    assert step.optimizer_seconds(["t"]) > A100.step_seconds


def test_every_unit_of_a_chunk_can_be_timed() -> None:
    timing = ClusterTiming(cluster=A100, costs=CostModel(model=MODEL, tensor_size=2))
    for name in chunk_units("EtL", MODEL):
        assert timing.unit(name, WITH_IMAGES).forward > 0
