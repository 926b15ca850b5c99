"""FusedAdam against torch's own optimizers."""

import copy

import pytest
import torch

from megatron_vl.device.fused_adam import FusedAdam

SHAPES = [(3, 5), (7,), (), (2, 2, 2)]


def parameters(seed: int = 0) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def groups(params: list[torch.nn.Parameter]) -> list[dict[str, object]]:
    return [
        {"params": params[:2], "weight_decay": 0.1},
        {"params": params[2:], "weight_decay": 0.0, "lr": 1e-3},
    ]


def take_steps(optimizer: torch.optim.Optimizer, steps: range) -> None:
    """Gradients depend on the step alone; the rate changes, as a schedule would have it."""
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for group in optimizer.param_groups:
            group["lr"] *= 0.9
            for param in group["params"]:
                param.grad = torch.randn(param.shape, generator=generator)
        optimizer.step()


def values(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [param.detach() for group in optimizer.param_groups for param in group["params"]]


@pytest.mark.parametrize(
    ("adam_w_mode", "reference_class"), [(True, torch.optim.AdamW), (False, torch.optim.Adam)]
)
def test_equals_torch(adam_w_mode: bool, reference_class: type[torch.optim.Optimizer]) -> None:
    settings = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8}
    ours = FusedAdam(groups(parameters()), adam_w_mode=adam_w_mode, **settings)
    reference = reference_class(groups(parameters()), **settings)
    take_steps(ours, range(8))
    take_steps(reference, range(8))
    torch.testing.assert_close(values(ours), values(reference), rtol=0, atol=1e-6)


def test_state_round_trips() -> None:
    straight = FusedAdam(groups(parameters()), lr=1e-2)
    take_steps(straight, range(3))
    resumed = FusedAdam(groups(copy.deepcopy(values_as_parameters(straight))), lr=1.0)
    resumed.load_state_dict(copy.deepcopy(straight.state_dict()))
    take_steps(straight, range(3, 6))
    take_steps(resumed, range(3, 6))
    assert [group["step"] for group in resumed.param_groups] == [6, 6]
    assert all(torch.equal(a, b) for a, b in zip(values(straight), values(resumed), strict=True))


def values_as_parameters(optimizer: torch.optim.Optimizer) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(value.clone()) for value in values(optimizer)]


def test_contract_of_megatron_core() -> None:
    optimizer = FusedAdam(parameters(), lr=1e-2)
    take_steps(optimizer, range(2))
    assert optimizer.param_groups[0]["step"] == 2
    for state in optimizer.state_dict()["state"].values():
        assert set(state) == {"exp_avg", "exp_avg_sq"}


def test_cutting_a_tensor_changes_no_bit() -> None:
    generator = torch.Generator().manual_seed(0)
    whole, gradient = torch.randn(103, generator=generator), torch.randn(103, generator=generator)

    def updated(cuts: list[int]) -> torch.Tensor:
        params = [torch.nn.Parameter(part.clone()) for part in whole.split(cuts)]
        optimizer = FusedAdam(params, lr=1e-2, weight_decay=0.1)
        for _ in range(5):
            for param, part in zip(params, gradient.split(cuts), strict=True):
                param.grad = part.clone()
            optimizer.step()
        return torch.cat([param.detach() for param in params])

    assert torch.equal(updated([103]), updated([1, 7, 50, 45]))


def test_parameters_without_gradient_stay() -> None:
    params = parameters()
    before = [param.detach().clone() for param in params]
    params[0].grad = torch.ones_like(params[0])
    FusedAdam(params, lr=1e-2, weight_decay=0.1).step()
    assert [torch.equal(a, b) for a, b in zip(before, params, strict=True)] == [False, True, True, True]


def test_closure_is_refused() -> None:
    with pytest.raises(ValueError, match="closure"):
        FusedAdam(parameters()).step(lambda: 0.0)
