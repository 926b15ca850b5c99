"""megatron-core's own model, gradients, optimizer and checkpoint on a CPU, through the import hook."""

from pathlib import Path

import pytest
import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import Float16Module

from tests.support.ranks import run_ranks

VOCABULARY, SEQUENCE, BATCH = 64, 8, 4


def build(tensor_size: int = 1, seed: int = 1, bf16: bool = False) -> GPTModel:
    """A tiny decoder whose initial weights do not depend on the tensor-parallel size."""
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tensor_size, create_gloo_process_groups=False
    )
    model_parallel_cuda_manual_seed(seed)
    torch.manual_seed(seed)
    config = TransformerConfig(
        num_layers=2,
        hidden_size=32,
        num_attention_heads=4,
        use_cpu_initialization=True,
        tensor_model_parallel_size=tensor_size,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bf16=bf16,
        params_dtype=torch.bfloat16 if bf16 else torch.float32,
        cuda_graph_scope=[],
    )
    return GPTModel(config, get_gpt_layer_local_spec(), VOCABULARY, SEQUENCE, position_embedding_type="rope")


def batch() -> torch.Tensor:
    """Token ids, one more per row than the model reads."""
    return torch.arange(BATCH * (SEQUENCE + 1)).view(BATCH, SEQUENCE + 1) * 7 % VOCABULARY


def mean_loss(model: torch.nn.Module, rows_BS: torch.Tensor) -> torch.Tensor:
    positions_BS = torch.arange(SEQUENCE).expand(len(rows_BS), SEQUENCE)
    masked = torch.ones(1, 1, SEQUENCE, SEQUENCE).tril() < 0.5
    return model(rows_BS[:, :-1], positions_BS, masked, labels=rows_BS[:, 1:].contiguous()).mean()


def loss_and_gradients(tensor_size: int) -> tuple[float, dict[str, torch.Tensor]]:
    model = build(tensor_size)
    loss = mean_loss(model, batch())
    loss.backward()
    return loss.item(), {name: param.grad for name, param in model.named_parameters()}


@pytest.fixture(scope="module")
def serial() -> tuple[float, dict[str, torch.Tensor]]:
    """Of one process: what every parallel run has to reproduce."""
    return run_ranks(1, loss_and_gradients, 1)[0]


def test_tensor_parallel_equals_serial(serial: tuple[float, dict[str, torch.Tensor]]) -> None:
    loss, gradients = serial
    ranks = run_ranks(2, loss_and_gradients, 2)
    for rank_loss, _ in ranks:
        assert rank_loss == pytest.approx(loss, abs=1e-6)
    shards = [rank_gradients for _, rank_gradients in ranks]
    for name, gradient in gradients.items():
        parts = [rank_gradients[name] for rank_gradients in shards]
        whole = parts[0] if parts[0].shape == gradient.shape else torch.cat(parts, dim=_cut_dimension(name))
        torch.testing.assert_close(whole.view_as(gradient), gradient, rtol=1e-4, atol=1e-7)


def _cut_dimension(name: str) -> int:
    """Row-parallel layers are cut along their input, the others along their output."""
    return 1 if name.endswith(("linear_proj.weight", "linear_fc2.weight")) else 0


def distribute(model: GPTModel) -> tuple[DistributedDataParallel, MegatronOptimizer]:
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, use_distributed_optimizer=True, overlap_grad_reduce=True
    )
    config = OptimizerConfig(
        lr=1e-2,
        weight_decay=0.1,
        adam_eps=1e-4,  # the bias of the keys has no gradient but rounding, which Adam would amplify
        use_distributed_optimizer=True,
        bf16=model.config.bf16,
    )
    # All weights in one type: the distributed optimizer mixes up the states of groups with both.
    inner = Float16Module(model.config, model) if model.config.bf16 else model
    wrapped = DistributedDataParallel(model.config, ddp_config, inner)
    return wrapped, get_megatron_optimizer(config, [wrapped], use_gloo_process_groups=False)


def train(
    wrapped: DistributedDataParallel, optimizer: MegatronOptimizer, num_steps: int
) -> list[torch.Tensor]:
    """The weights after some steps on this rank's share of the same batch."""
    rank, size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    share_BS = batch().chunk(size)[rank]
    for _ in range(num_steps):
        wrapped.zero_grad_buffer()
        optimizer.zero_grad()
        mean_loss(wrapped, share_BS).backward()
        finalize_model_grads([wrapped])
        optimizer.step()
    return [param.detach().clone() for param in wrapped.parameters()]


def weights_after_three_steps() -> list[torch.Tensor]:
    return train(*distribute(build()), num_steps=3)


def test_distributed_optimizer_equals_serial() -> None:
    serial = run_ranks(1, weights_after_three_steps)[0]
    for weights in run_ranks(2, weights_after_three_steps):
        torch.testing.assert_close(weights, serial, rtol=1e-4, atol=1e-6)


def sharded_state(
    wrapped: DistributedDataParallel, optimizer: MegatronOptimizer, is_loading: bool
) -> dict[str, object]:
    weights = wrapped.module.sharded_state_dict()
    metadata = {"distrib_optim_sharding_type": "fully_reshardable"}
    state = optimizer.sharded_state_dict(weights, is_loading=is_loading, metadata=metadata)
    return {"model": weights, "optimizer": state}


def straight_and_resumed(folder: Path, bf16: bool) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The weights after four steps at once, and through a checkpoint after the third into a fresh model."""
    wrapped, optimizer = distribute(build(bf16=bf16))
    train(wrapped, optimizer, num_steps=3)
    dist_checkpointing.save(sharded_state(wrapped, optimizer, is_loading=False), str(folder))
    straight = train(wrapped, optimizer, num_steps=1)

    wrapped, optimizer = distribute(build(bf16=bf16, seed=2))
    loaded = dist_checkpointing.load(sharded_state(wrapped, optimizer, is_loading=True), str(folder))
    wrapped.module.load_state_dict(loaded["model"])
    optimizer.load_state_dict(loaded["optimizer"])
    return straight, train(wrapped, optimizer, num_steps=1)


@pytest.mark.parametrize("bf16", [False, True])
def test_resume_from_a_checkpoint_is_exact(bf16: bool, tmp_path: Path) -> None:
    for straight, resumed in run_ranks(2, straight_and_resumed, tmp_path, bf16):
        assert all(torch.equal(a, b) for a, b in zip(straight, resumed, strict=True))
