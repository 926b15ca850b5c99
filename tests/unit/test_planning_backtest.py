"""Published Megatron runs against what the A100 file that plans the 7B model predicts for them."""

import pytest

from megatron_vl.planning.backtest import GptCosts, backtest, predict
from megatron_vl.planning.published import RUN_22B, RUNS, SEQUENCE_LENGTH, VOCABULARY, PublishedRun
from megatron_vl.planning.timing import ClusterTiming
from megatron_vl.planning.work import activation, attention, moved, norm, product
from megatron_vl.planning.workload import Load
from tests.support.clusters import CONFIGS, cluster_of

PEAK_FLOPS = 312e12

# Forward, and backward with what is computed again: milliseconds of a layer of the 22B model (Table 4 of the paper).
LAYER_MILLISECONDS = {
    ("none", False): (7.7, 11.9),
    ("none", True): (7.2, 11.8),
    ("full", False): (7.7, 19.5),
    ("selective", False): (7.7, 13.2),
    ("selective", True): (7.2, 13.1),
}


def model_flops(run: PublishedRun) -> float:
    """Of an iteration, every pair of tokens counted (the paper's appendix A)."""
    hidden, layers = run.hidden_size, run.num_layers
    tokens = run.global_batch_size * SEQUENCE_LENGTH
    head = VOCABULARY / (12 * hidden * layers)
    return 72 * tokens * layers * hidden**2 * (1 + SEQUENCE_LENGTH / (6 * hidden) + head)


@pytest.mark.parametrize(
    ("run", "recompute"),
    [(run, recompute) for run in RUNS for recompute in run.seconds],
    ids=lambda value: value if isinstance(value, str) else f"{value.name}-{value.num_devices}",
)
def test_a_published_iteration_is_predicted_within_ten_per_cent(run: PublishedRun, recompute: str) -> None:
    predicted = predict(run, recompute, cluster_of("a100_64x8"))
    assert predicted.published_seconds == run.seconds[recompute]
    assert abs(predicted.error) < 0.10


@pytest.mark.parametrize("run", RUNS, ids=lambda run: f"{run.name}-{run.num_devices}")
def test_published_seconds_and_utilisation_agree(run: PublishedRun) -> None:
    """The figures were written down rightly: model, batch, devices, seconds and utilisation fit each other."""
    achieved = model_flops(run) / (run.seconds["selective"] * run.num_devices)
    assert achieved / PEAK_FLOPS == pytest.approx(run.mfu, abs=0.002)


@pytest.mark.parametrize("run", RUNS, ids=lambda run: f"{run.name}-{run.num_devices}")
def test_costs_of_the_published_models_are_the_papers(run: PublishedRun) -> None:
    tokens = run.global_batch_size * SEQUENCE_LENGTH
    load = Load(num_tokens=tokens, num_images=0, num_pairs=tokens * SEQUENCE_LENGTH / 2)
    costs = GptCosts(model=run.model)
    layer, head = costs.unit("decoder_layer", load), costs.unit("head", load)
    passes = ("forward", "input_gradient", "weight_gradient")
    counted = sum(run.num_layers * getattr(layer, one).flops + getattr(head, one).flops for one in passes)
    assert counted == pytest.approx(model_flops(run), rel=1e-9)


@pytest.mark.parametrize(("recompute", "divided"), LAYER_MILLISECONDS)
def test_a_published_layer_is_predicted_within_ten_per_cent(recompute: str, divided: bool) -> None:
    costs = GptCosts(model=RUN_22B.model, tensor_size=8, sequence_parallel=divided)
    timing = ClusterTiming(cluster=cluster_of("a100_64x8"), costs=costs)
    tokens = RUN_22B.micro_batch_size * SEQUENCE_LENGTH
    load = Load(num_tokens=tokens, num_images=0, num_pairs=tokens * SEQUENCE_LENGTH / 2)
    layer = timing.unit("decoder_layer", load)
    again = {"none": 0.0, "selective": timing.unit("core_attention", load).forward, "full": layer.forward}
    forward, backward = LAYER_MILLISECONDS[recompute, divided]
    assert 1e3 * layer.forward == pytest.approx(forward, rel=0.10)
    found = layer.input_gradient + layer.weight_gradient + again[recompute]
    assert 1e3 * found == pytest.approx(backward, rel=0.10)


def test_training_with_flash_attention_is_predicted_within_ten_per_cent() -> None:
    """FlashAttention-2 (arXiv 2307.08691): up to 225 TFLOP/s an A100 in training a GPT of 2.7B parameters on rows of
    8192 tokens, by a formula that counts every pair of tokens. No tensor parallelism, and kernels of today."""
    hidden, layers, length, vocabulary, tokens = 2560, 32, 8192, 50257, 16384
    layer = (
        product(tokens, hidden, 4 * hidden)  # queries, keys, values, output
        + product(tokens, hidden, 8 * hidden)  # GELU MLP
        + attention(tokens * length / 2, hidden, hidden)
        + norm(2 * tokens * hidden) * 2
        + moved(7 * tokens * hidden, 11 * tokens * hidden) * 2  # bias, dropout and residual in one kernel
        + activation(2 * tokens * 4 * hidden)
    )
    model = layer * layers + product(tokens, hidden, vocabulary)
    cluster = cluster_of("a100_64x8")
    speed, efficiency = cluster.peak_flops, cluster.efficiency
    seconds = sum(
        work.matmul_flops / (speed * efficiency.decoder)
        + work.attention_flops / (speed * efficiency.attention)
        + work.moved_bytes / (cluster.memory_bytes_per_second * efficiency.memory)
        for work in (model.forward, model.input_gradient, model.weight_gradient)
    )
    parameters = 12 * layers * hidden**2 + vocabulary * hidden
    counted = (6 * parameters + 12 * layers * hidden * length) * tokens
    assert counted / seconds / 1e12 == pytest.approx(225, rel=0.10)


def test_the_page_shows_what_is_predicted_now() -> None:
    rows = [
        f"| {one.run.name} | {one.run.num_devices} | {one.recompute} | {one.published_seconds:.2f} | "
        f"{one.predicted_seconds:.2f} | {100 * one.error:+.1f} | {100 * one.bubble_fraction:.1f} |"
        for one in backtest(cluster_of("a100_64x8"))
    ]
    page = (CONFIGS.parent / "docs" / "cost_model.md").read_text()
    assert [row for row in rows if row not in page] == []
