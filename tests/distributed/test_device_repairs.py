"""What megatron-core cannot do on its own without TransformerEngine: each test fails without its repair."""

import os
from pathlib import Path

import psutil
import pytest
import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer import MLATransformerConfig, TransformerConfig

from tests.support.ranks import run_ranks

VOCABULARY, SEQUENCE = 64, 8


class CausalAttention(torch.nn.Module):
    """As a core attention of megatron-core, for keys and values of different widths."""

    def __init__(self, config: TransformerConfig, **settings: object) -> None:
        super().__init__()

    def forward(
        self, q_SBND: torch.Tensor, k_SBND: torch.Tensor, v_SBND: torch.Tensor, *masks: object, **more: object
    ) -> torch.Tensor:
        heads_first = [x_SBND.permute(1, 2, 0, 3) for x_SBND in (q_SBND, k_SBND, v_SBND)]
        out_BNSD = torch.nn.functional.scaled_dot_product_attention(*heads_first, is_causal=True)
        return out_BNSD.permute(2, 0, 1, 3).flatten(start_dim=2)


def loss_and_gradients(expert_size: int = 1, **settings: object) -> tuple[float, dict[str, torch.Tensor]]:
    """Of a tiny decoder with these settings, whose weights depend on their names alone."""
    parallel_state.initialize_model_parallel(expert_model_parallel_size=expert_size)
    model_parallel_cuda_manual_seed(1)
    latent = bool(settings.pop("latent", False))
    common = {
        "num_layers": 2,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "normalization": "RMSNorm",
        "add_bias_linear": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "bias_dropout_fusion": False,
        "masked_softmax_fusion": False,
        "gradient_accumulation_fusion": False,
        "cuda_graph_scope": [],
        "expert_model_parallel_size": expert_size,
    }
    config = (MLATransformerConfig if latent else TransformerConfig)(**common, **settings)
    spec = get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts,
        normalization="RMSNorm",
        multi_latent_attention=latent,
    )
    if latent:  # megatron-core's own attention wants all heads of one width
        spec.submodules.self_attention.submodules.core_attention = CausalAttention
    model = GPTModel(config, spec, VOCABULARY, SEQUENCE, position_embedding_type="rope")
    for name, param in model.named_parameters():
        seed = (
            sum(name.encode()) if ".local_experts." not in name else 7
        )  # experts differ by their rows' routing
        param.data.normal_(std=0.2, generator=torch.Generator().manual_seed(seed))
    tokens_BS = torch.arange(2 * SEQUENCE).view(2, SEQUENCE) * 7 % VOCABULARY
    masked = torch.ones(1, 1, SEQUENCE, SEQUENCE).tril() < 0.5
    positions_BS = torch.arange(SEQUENCE).expand(2, SEQUENCE)
    loss = model(tokens_BS, positions_BS, masked, labels=tokens_BS.roll(-1, dims=1)).mean()
    loss.backward()
    return loss.item(), {name: param.grad for name, param in model.named_parameters()}


def plain() -> tuple[float, dict[str, torch.Tensor]]:
    return loss_and_gradients()


def with_norms_recomputed() -> tuple[float, dict[str, torch.Tensor]]:
    return loss_and_gradients(recompute_granularity="selective", recompute_modules=["layernorm"])


def test_discarded_outputs_are_recomputed() -> None:
    (loss, gradients), (recomputed_loss, recomputed) = run_ranks(1, plain) + run_ranks(
        1, with_norms_recomputed
    )
    assert recomputed_loss == loss
    torch.testing.assert_close(recomputed, gradients, rtol=1e-4, atol=1e-7)


def with_experts(expert_size: int) -> tuple[float, dict[str, torch.Tensor]]:
    return loss_and_gradients(
        expert_size,
        num_moe_experts=4,
        moe_router_topk=2,
        moe_token_dispatcher_type="alltoall",
        moe_router_dtype="fp32",
        moe_ffn_hidden_size=16,
    )


def test_experts_on_two_ranks_equal_one() -> None:
    loss, gradients = run_ranks(1, with_experts, 1)[0]
    for rank_loss, rank_gradients in run_ranks(2, with_experts, 2):
        assert rank_loss == pytest.approx(loss, abs=1e-6)
        router = "decoder.layers.0.mlp.router.weight"
        torch.testing.assert_close(rank_gradients[router], gradients[router], rtol=1e-4, atol=1e-7)


def with_latent_attention() -> tuple[float, dict[str, torch.Tensor]]:
    return loss_and_gradients(
        latent=True,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_head_dim=8,
        qk_pos_emb_head_dim=8,
        v_head_dim=8,
        rope_type="rope",
    )


def test_latent_attention_trains() -> None:
    loss, gradients = run_ranks(1, with_latent_attention)[0]
    assert loss < 20
    assert all(gradient.abs().sum() > 0 for gradient in gradients.values())


def processes_started_by_saving(folder: Path) -> list[str]:
    weight = ShardedTensor.from_rank_offsets("weight", torch.ones(4))
    folder.mkdir()
    os.register_at_fork(before=(folder / "forked").touch)
    dist_checkpointing.save({"weight": weight}, str(folder))
    return [str(found) for found in (*psutil.Process().children(), *folder.glob("forked"))]


def test_saving_starts_no_processes(tmp_path: Path) -> None:
    """Forks of a process with threads may hang, and whatever is started outlives a rank that is killed."""
    assert run_ranks(1, processes_started_by_saving, tmp_path / "checkpoint") == [[]]
