"""AdamW through megatron-core's distributed optimizer, taken apart into norm, clip and step.

Taken apart so that the norm's collective can carry everything else that ranks must agree on before a step.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import (
    MegatronOptimizer,
    OptimizerConfig,
    get_megatron_optimizer,
    get_standard_config_overrides,
)
from megatron.core.optimizer.optimizer_config import ParamKey
from torch import Tensor

from megatron_vl.config.parallel import ParallelConfig
from megatron_vl.config.train import TrainConfig


@dataclass(frozen=True)
class Optimizer:
    """One stage's optimizer over this rank's shards of the trainable parameters."""

    inner: MegatronOptimizer
    device: torch.device

    def set_learning_rate(self, learning_rate: float) -> None:
        """Set the rate of every group; a group's `lr_mult` scales it."""
        for group in self.inner.param_groups:
            group["lr"] = learning_rate * group["lr_mult"]

    def prepare(self) -> Tensor:
        """Hand the gradients, summed over all tokens of the step, to the optimizer.

        Returns:
            The sum of their squares over this rank's shards (a scalar in fp32): summed over all ranks it is the
            square of the global norm, with tensor-parallel replicas counted once.
        """
        self.inner.prepare_grads()
        gradients = [gradient for part in self._parts() for gradient in part.get_main_grads_for_grad_norm()]
        if not gradients:
            return torch.zeros((), device=self.device)
        return torch.stack(torch._foreach_norm(gradients)).square().sum()

    def step(self, gradient_scale: float) -> None:
        """Multiply the gradients by `gradient_scale` and update the weights."""
        parameters = [parameter for part in self._parts() for parameter in part.get_parameters()]
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        if gradients:
            torch._foreach_mul_(gradients, gradient_scale)
        self.inner.step_with_ready_grads()

    def zero_gradients(self) -> None:
        self.inner.zero_grad()

    def _parts(self) -> Iterator[Any]:
        yield from getattr(self.inner, "chained_optimizers", [self.inner])


def build_optimizer(
    chunks: list[DistributedDataParallel],
    train: TrainConfig,
    parallel: ParallelConfig,
    vision_learning_rate_scale: float,
    device: torch.device,
) -> Optimizer:
    """AdamW with fp32 main parameters; biases and norms do not decay; vision towers may have their own rate."""
    config = OptimizerConfig(
        optimizer="adam",
        lr=0.0,  # set before every step
        weight_decay=train.weight_decay,
        adam_beta1=train.adam_beta1,
        adam_beta2=train.adam_beta2,
        adam_eps=train.adam_epsilon,
        bf16=train.precision == "bf16",
        params_dtype={"fp32": torch.float32, "bf16": torch.bfloat16}[train.precision],
        use_distributed_optimizer=True,
        overlap_param_gather=parallel.overlap_param_gather,
        clip_grad=train.gradient_clip,
    )
    overrides: dict[ParamKey, Any] = dict(get_standard_config_overrides(config))
    if vision_learning_rate_scale != 1.0:
        overrides[ParamKey(name="*stage_zero.towers.*")] = {"lr_mult": vision_learning_rate_scale}
    inner = get_megatron_optimizer(config, chunks, config_overrides=overrides, use_gloo_process_groups=False)
    return Optimizer(inner, device)
