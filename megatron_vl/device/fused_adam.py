"""Adam as megatron-core's optimizers expect it, for hosts without TransformerEngine and apex."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.optim.adam import adam


class FusedAdam(torch.optim.Optimizer):
    """Adam over torch's fused kernels, with the contract of TransformerEngine's class of this name.

    The step count is one integer in the parameter group (torch.optim keeps a tensor per parameter, which
    megatron-core's distributed optimizer can save but not load). A parameter's state is `exp_avg` and
    `exp_avg_sq`. An element's update does not depend on its place in a tensor, so neither does it on how the
    distributed optimizer cuts parameters into shards.

    Args:
        params: parameters, or parameter groups.
        lr: learning rate.
        betas: decay of the running means of the gradient and of its square.
        eps: added to the denominator.
        weight_decay: decay per step, times `lr`.
        adam_w_mode: decay the weights apart from the gradient (AdamW) rather than as a part of it (L2).
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adam_w_mode: bool = True,
    ) -> None:
        super().__init__(
            params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "step": 0}
        )
        self.adam_w_mode = adam_w_mode

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient. `closure` exists for the base class: leave it None."""
        if closure is not None:
            raise ValueError("FusedAdam evaluates no closure: compute the gradients before step()")
        for group in self.param_groups:
            group["step"] += 1
            self._update(group, [param for param in group["params"] if param.grad is not None])

    def _update(self, group: dict[str, Any], params: list[torch.Tensor]) -> None:
        if not params:
            return
        states = [self._state_of(param) for param in params]
        # The kernel wants a count per parameter, before this step, and adds one to each.
        steps = torch.full((len(params),), group["step"] - 1, dtype=torch.float32, device=params[0].device)
        adam(
            params,
            [param.grad for param in params if param.grad is not None],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            max_exp_avg_sqs=[],
            state_steps=list(steps.unbind()),
            fused=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
            decoupled_weight_decay=self.adam_w_mode,
        )

    def _state_of(self, param: torch.Tensor) -> dict[str, torch.Tensor]:
        state: dict[str, torch.Tensor] = self.state[param]
        if not state:
            state["exp_avg"] = torch.zeros_like(param)
            state["exp_avg_sq"] = torch.zeros_like(param)
        return state
