"""How memory must change with a setting; what it amounts to is compared with real ranks in tests/distributed."""

from dataclasses import replace

from megatron_vl.config.model import ModelConfig
from megatron_vl.planning.layout import resolve_layout
from megatron_vl.planning.memory import Execution, RankMemory, peak_bytes, rank_memory
from megatron_vl.planning.setting import Setting
from megatron_vl.planning.topology import Topology
from megatron_vl.planning.workload import Workload
from tests.support.training import tiny_model

JOINT = frozenset({"adaptor", "embedding", "decoder", "head"})
WORKLOAD = Workload(
    stage="joint",
    trained=JOINT,
    num_steps=1,
    global_batch_size=256,
    sequence_length=2048,
    text_ratio=0.5,
    images_per_row=2.0,
    max_images_per_row=4,
    tokens_per_row=2048,
    segment_tokens=512,
)


def model(num_layers: int = 16) -> ModelConfig:
    return replace(tiny_model(), language=replace(tiny_model().language, num_layers=num_layers))


def setting(
    world_size: int, tensor: int = 1, pipeline: int = 1, virtual: int = 1, **values: str | bool
) -> Setting:
    topology = Topology(
        world_size=world_size, tensor_size=tensor, pipeline_size=pipeline, virtual_size=virtual
    )
    return Setting(
        topology=topology,
        layout=resolve_layout(None, 16, topology),
        micro_batch_size=1,
        **{"sequence_parallel": False, **values},  # type: ignore[arg-type]
    )


def memory(chosen: Setting, rank: int = 0, workload: Workload = WORKLOAD) -> RankMemory:
    return rank_memory(model(), workload, chosen, rank)


def test_data_parallel_ranks_share_the_optimizer_alone() -> None:
    one, eight = memory(setting(1)), memory(setting(8))
    assert eight.optimizer == one.optimizer // 8
    assert replace(eight, optimizer=one.optimizer) == one


def test_tensor_parallel_ranks_halve_most_and_with_sequences_more() -> None:
    one, two = memory(setting(1)), memory(setting(2, tensor=2))
    divided = memory(setting(2, tensor=2, sequence_parallel=True))
    assert one.activations / 2 < two.activations < one.activations
    assert divided.activations < two.activations
    assert divided.activations - two.activations / 2 < one.activations / 2


def test_recompute_keeps_less_the_more_it_covers() -> None:
    kept = [memory(setting(1, recompute=how)).activations for how in ("none", "selective", "full")]
    assert kept[0] > kept[1] > kept[2]
    layer_input = 2048 * tiny_model().language.hidden_size * 2
    half = replace(setting(1, recompute="full"), layout="E" + 8 * "t" + "L")
    fewer = rank_memory(model(8), WORKLOAD, half, 0)
    assert kept[2] - fewer.activations == 8 * layer_input


def test_earlier_stages_keep_more_microbatches() -> None:
    """1F1B: PP - rank of them; the chunks between the ends are alike."""
    kept = [memory(setting(4, pipeline=4), rank).activations for rank in range(4)]
    assert kept[1] * 2 == kept[2] * 3
    assert kept[0] > kept[1] > kept[2]
    one_row = replace(WORKLOAD, global_batch_size=1)
    assert memory(setting(4, pipeline=4), 1, one_row).activations * 3 == kept[1]


def test_virtual_stages_keep_more() -> None:
    chosen = setting(4, pipeline=4, virtual=2)
    assert memory(chosen, 1).activations > memory(setting(4, pipeline=4), 1).activations


def test_frozen_parts_have_neither_gradients_nor_optimizer() -> None:
    adaptor = memory(setting(1), workload=replace(WORKLOAD, trained=frozenset({"adaptor"})))
    joint = memory(setting(1))
    assert adaptor.parameters == joint.parameters
    assert adaptor.gradients < joint.gradients / 10
    assert adaptor.activations < joint.activations


def test_a_spread_step_holds_the_features_of_all_its_images() -> None:
    spread = setting(2, pipeline=2, vision_placement="spread")
    per_image = 36 * (128 + 64) * 2  # tokens, widths of SAM and SigLIP, bytes
    assert memory(spread, 0).features == 256 * 4 * per_image
    assert memory(spread, 1).features == 0
    replicated = setting(2, pipeline=2)
    assert memory(spread, 1).parameters > memory(replicated, 1).parameters


def test_fused_kernels_and_bf16_take_less_and_the_peak_is_the_worst_rank() -> None:
    chosen = setting(4, pipeline=4)
    peaks = [
        peak_bytes(model(), WORKLOAD, chosen, Execution(precision=precision, fused=fused))
        for precision, fused in (("bf16", True), ("bf16", False), ("fp32", False))
    ]
    assert peaks == sorted(peaks)
    assert peaks[0] == max(memory(chosen, rank).total for rank in range(4))


def test_a_stage_without_images_encodes_nothing() -> None:
    text = replace(WORKLOAD, images_per_row=0.0, max_images_per_row=0)
    without, with_images = memory(setting(1), workload=text), memory(setting(1))
    assert without.parameters == with_images.parameters
    assert without.total < with_images.total
