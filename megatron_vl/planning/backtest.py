"""Published Megatron runs on A100, timed by the same cluster file, communication and schedule as our model.

The runs (`planning.published`) trained GPTs of their time: a GELU MLP of four times the width, LayerNorm, biases,
dropout, and attention that writes its scores to memory. So their layers have costs of their own here; all else is
shared. Weight gradients accumulate inside their product, as Megatron-LM's fused kernel does it.
"""

from dataclasses import dataclass, replace

from megatron_vl.config.cluster import ClusterConfig
from megatron_vl.planning.chunk_times import ChunkTimes
from megatron_vl.planning.communication import Volume, data_link, ring_seconds, send_seconds
from megatron_vl.planning.cost import FP32_BYTES, CostModel
from megatron_vl.planning.layout import even_layout, parse_layout
from megatron_vl.planning.published import RUNS, SEQUENCE_LENGTH, VOCABULARY, PublishedRun
from megatron_vl.planning.schedule import Schedule
from megatron_vl.planning.setting import Setting
from megatron_vl.planning.simulate import case_of, replay
from megatron_vl.planning.step_times import GRADIENT_BYTES
from megatron_vl.planning.timing import ClusterTiming
from megatron_vl.planning.topology import Topology
from megatron_vl.planning.work import UnitWork, Work, moved, norm, product
from megatron_vl.planning.workload import Load

MASK_BYTES = 1  # of dropout, an element


@dataclass(frozen=True, kw_only=True)
class GptCosts(CostModel):
    """A rank's units of a GPT of 2022; those of vision cost nothing."""

    def unit(self, name: str, load: Load) -> UnitWork:
        """See CostModel."""
        match name:
            case "decoder_layer":
                return self._layer(load)
            case "core_attention":
                return self._core_attention(load)
            case "loss":
                return self._loss(load)
            case "head":
                language = self.model.language
                return product(load.num_tokens, language.hidden_size, language.vocab_size / self.tensor_size)
            case "embedding" | "final_norm":
                return super().unit(name, load)
        return UnitWork()

    def _core_attention(self, load: Load) -> UnitWork:
        """All pairs of tokens, in three kernels: scaled and masked softmax, dropout, and the two products."""
        language = self.model.language
        pairs = 2 * load.num_pairs
        flops = Work(attention_flops=4 * pairs * language.hidden_size / self.tensor_size)
        scores = pairs * language.num_heads / self.tensor_size
        size = self.element_bytes
        softmax = moved(2 * size * scores, 3 * size * scores)
        dropout = moved((2 * size + MASK_BYTES) * scores, (2 * size + MASK_BYTES) * scores)
        return UnitWork(forward=flops, input_gradient=flops * 2) + softmax + dropout

    def _layer(self, load: Load) -> UnitWork:
        tokens, hidden, size = load.num_tokens, self.model.language.hidden_size, self.element_bytes
        ffn, share = self.model.language.ffn_hidden_size, self.tensor_size
        stream = tokens * hidden / self.sequence_share  # elements
        joined = moved((3 * size + MASK_BYTES) * stream, (2 * size + MASK_BYTES + 3 * size) * stream)
        heads = moved(2 * size * tokens * hidden / share, 2 * size * tokens * hidden / share)
        gelu = moved(2 * size * tokens * ffn / share, 3 * size * tokens * ffn / share)
        biases = size * (tokens * (3 * hidden + ffn) / share + 2 * stream)  # read to be summed
        return (
            product(tokens, hidden, 3 * hidden / share)
            + product(tokens, hidden / share, hidden)
            + product(tokens, hidden, ffn / share)
            + product(tokens, ffn / share, hidden)
            + self._core_attention(load)
            + norm(stream * size) * 2
            + joined * 2  # bias, dropout and residual in one kernel
            + heads
            + gelu
            + UnitWork(weight_gradient=Work(moved_bytes=biases))
        )

    def _loss(self, load: Load) -> UnitWork:
        """Megatron's cross-entropy: a copy of the logits in fp32, then pass by pass: largest, shift, exponentiate, sum,
        divide; backward the gradient copied, scaled and cast."""
        logits = load.num_tokens * self.model.language.vocab_size / self.tensor_size
        cast = self.element_bytes + FP32_BYTES
        return moved(logits * (cast + 8 * FP32_BYTES), logits * (4 * FP32_BYTES + cast))


@dataclass(frozen=True, kw_only=True)
class Backtest:
    """A published time and ours for it. `recompute`: full, or selective with sequence parallelism."""

    run: PublishedRun
    recompute: str
    published_seconds: float
    predicted_seconds: float
    bubble_fraction: float

    @property
    def error(self) -> float:
        """Relative; above 0 where the prediction is too long."""
        return self.predicted_seconds / self.published_seconds - 1.0


def backtest(cluster: ClusterConfig) -> list[Backtest]:
    """All published runs, predicted for `cluster`, which should be one of A100s with NVLink."""
    return [predict(run, recompute, cluster) for run in RUNS for recompute in run.seconds]


def predict(run: PublishedRun, recompute: str, cluster: ClusterConfig) -> Backtest:
    """One published run, by the cluster's figures."""
    topology = Topology(
        world_size=run.num_devices,
        tensor_size=run.tensor_size,
        pipeline_size=run.pipeline_size,
        virtual_size=run.virtual_size,
    )
    divided = recompute == "selective"
    costs = GptCosts(model=run.model, tensor_size=run.tensor_size, sequence_parallel=divided)
    setting = Setting(
        topology=topology,
        layout=even_layout(run.num_layers, topology),
        sequence_parallel=divided,
        micro_batch_size=run.micro_batch_size,
        recompute=recompute,
    )
    timing = ClusterTiming(cluster=cluster, costs=costs)
    times = ChunkTimes(
        model=run.model,
        trained=frozenset({"embedding", "decoder", "head"}),
        setting=setting,
        timing=timing,
        cluster=cluster,
    )
    tokens = run.micro_batch_size * SEQUENCE_LENGTH
    load = Load(num_tokens=tokens, num_images=0, num_pairs=tokens * SEQUENCE_LENGTH / 2)
    chunks = [times.chunk(chunk, load) for chunk in parse_layout(setting.layout)]
    replayed = replay(
        Schedule(
            pipeline_size=run.pipeline_size,
            virtual_size=run.virtual_size,
            num_microbatches=run.num_microbatches,
        ),
        case_of([one.forward for one in chunks], [one.backward for one in chunks], run.num_microbatches),
        # Tensor-parallel ranks send a share each even where rows are whole (Narayanan et al. 2021, section 4.1).
        send_seconds(load, replace(costs, sequence_parallel=True), cluster, topology),
    )
    return Backtest(
        run=run,
        recompute=recompute,
        published_seconds=run.seconds[recompute],
        predicted_seconds=float(replayed.seconds[0]) + _after_pipeline_seconds(run, topology, timing),
        bubble_fraction=float(replayed.bubble_fraction[0]),
    )


def _after_pipeline_seconds(run: PublishedRun, topology: Topology, timing: ClusterTiming) -> float:
    """An all-reduce of fp32 gradients that nothing hides, and an update of whole parameters on every rank."""
    layers = 12 * run.hidden_size**2 * run.num_layers
    ends = VOCABULARY * run.hidden_size if run.pipeline_size == 1 else 0
    parameters = (layers + ends) / topology.model_size
    reduced = Volume(num_bytes=2 * parameters * GRADIENT_BYTES, num_rounds=2)
    told = ring_seconds(reduced, data_link(timing.cluster, topology), topology.data_size)
    return told + timing.update(parameters, 1) + timing.cluster.step_seconds
