"""A row of metrics.jsonl: a step's counts and seconds as rates, and as shares of what the devices could do."""

from collections.abc import Mapping
from dataclasses import dataclass

from megatron_vl.config.root import PretrainConfig
from megatron_vl.data.loader import LoadedStep
from megatron_vl.device.machine import Device
from megatron_vl.planning.useful import UsefulFlops, useful_flops
from megatron_vl.train.metrics import StepMetrics
from megatron_vl.train.settings import StageSettings
from megatron_vl.train.step import StepResult


@dataclass(frozen=True, kw_only=True)
class Meter:
    """`peak_flops`: per second, of all devices of the run together; None where the cluster's are not known.

    `modality`: of each source.
    """

    stage: StageSettings
    flops: UsefulFlops
    peak_flops: float | None
    modality: Mapping[str, str]

    @classmethod
    def of(
        cls, config: PretrainConfig, stage: StageSettings, modality: Mapping[str, str], device: Device
    ) -> "Meter":
        return cls(
            stage=stage,
            flops=useful_flops(config.model, frozenset(stage.values.train)),
            peak_flops=_peak_flops(config, stage, device),
            modality=modality,
        )

    def row(self, loaded: LoadedStep, result: StepResult, learning_rate: float) -> StepMetrics:
        """Of the step that `loaded` has been trained on."""
        step, seconds = loaded.plan.step, result.seconds + loaded.wait_seconds
        language = self.flops.language(result.num_tokens, result.num_pairs)
        vision = self.flops.vision(result.num_images)
        return StepMetrics(
            stage=self.stage.name,
            step=step,
            global_step=self.stage.first_global_step + step - 1,
            modality=loaded.plan.modality,
            loss=result.loss,
            loss_by_source=result.loss_by_source,
            grad_norm=result.gradient_norm,
            learning_rate=learning_rate,
            num_tokens=result.num_tokens,
            num_tokens_by_source=result.num_tokens_by_source,
            num_supervised_tokens=result.num_supervised_tokens,
            num_samples=result.num_samples,
            num_failed_samples=result.num_failed_samples,
            num_images=result.num_images,
            step_seconds=seconds,
            tokens_per_second=result.num_tokens / seconds,
            tokens_per_second_by_modality=self._by_modality(result, seconds),
            images_per_second=result.num_images / seconds,
            mfu=self._share(language, seconds),
            mfu_with_vision=self._share(language + vision, seconds),
            data_wait_seconds=loaded.wait_seconds,
            bytes_fetched=result.bytes_fetched,
            bytes_used=result.bytes_used,
            fullest_rank=result.fullest.rank,
            host_memory_bytes=result.fullest.memory.host_bytes,
            device_peak_bytes=result.fullest.memory.device_peak_bytes,
            device_reserved_bytes=result.fullest.memory.device_reserved_bytes,
            text_ratio=loaded.plan.text_ratio,
            text_share=loaded.plan.text_share,
            skipped=result.skipped,
            slowest_rank=None if result.straggler is None else result.straggler.rank,
            straggler_ratio=None if result.straggler is None else result.straggler.ratio,
        )

    def _by_modality(self, result: StepResult, seconds: float) -> dict[str, float]:
        rates: dict[str, float] = {}
        for source, count in result.num_tokens_by_source.items():
            modality = self.modality[source]
            rates[modality] = rates.get(modality, 0.0) + count / seconds
        return rates

    def _share(self, flops: float, seconds: float) -> float | None:
        return None if self.peak_flops is None else flops / (seconds * self.peak_flops)


def _peak_flops(config: PretrainConfig, stage: StageSettings, device: Device) -> float | None:
    """None also where `cluster` is of another kind of device than this one."""
    cluster = config.cluster
    of_one = cluster.peak_flops if config.train.precision == "bf16" else cluster.peak_flops_fp32
    if cluster.device_type != device.kind or of_one <= 0:
        return None
    return of_one * stage.topology.world_size
