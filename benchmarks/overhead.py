"""Our training step in one process against a plain loop over transformers' model, on the same rows and weights.

Two models, each in fp32 and bf16: Llama on text (8 layers of width 512, 1024 tokens), and DeepSeek-VL with SigLIP on
rows with an image, its tower frozen. The plain loop: torch's fused AdamW over fp32 weights, clipped gradients, autocast
in bf16, scaled_dot_product_attention. One thread, medians of repeats in turns. Ends within 8 minutes.
"""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import (
    DeepseekVLConfig,
    DeepseekVLForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    SiglipVisionConfig,
)

from benchmarks.one_process import (
    IMAGE_TOKEN,
    LEARNING_RATE,
    MAX_NORM,
    WEIGHT_DECAY,
    Row,
    build,
    join_alone,
    random_row,
    step,
)
from benchmarks.paired import Times, in_turns, one_thread, paired_ratio, quartiles
from benchmarks.report import Goal, print_goals, run_benchmark, table
from benchmarks.sizes import IMAGE_TOKENS, LANGUAGE, NUM_TOKENS, SIGLIP, TRAINED, vision_model
from megatron_vl.checkpoint.convert.layouts import TRANSFORMERS
from megatron_vl.train.stage import Model

ROUNDS = 9
NO_SLOWER = 0.98
SAME_LOSS = {"fp32": 1e-5, "bf16": 2e-2}  # relative, of the first step
BETAS = (0.9, 0.95)
HEADER = ["CPU seconds: median [quartiles]", "ours", "transformers", "ratio [95 %]"]


def peer_model(with_image: bool) -> Any:
    text = LlamaConfig(
        hidden_size=LANGUAGE.hidden_size,
        num_hidden_layers=LANGUAGE.num_layers,
        num_attention_heads=LANGUAGE.num_heads,
        num_key_value_heads=LANGUAGE.num_heads,
        intermediate_size=LANGUAGE.ffn_hidden_size,
        vocab_size=LANGUAGE.vocab_size,
        max_position_embeddings=LANGUAGE.max_positions,
        rms_norm_eps=LANGUAGE.norm_epsilon,
        attn_implementation="sdpa",
    )
    if not with_image:
        return LlamaForCausalLM(text)
    tower = SiglipVisionConfig(
        hidden_size=SIGLIP.width,
        intermediate_size=SIGLIP.ffn_hidden_size,
        num_hidden_layers=SIGLIP.num_layers,
        num_attention_heads=SIGLIP.num_heads,
        image_size=SIGLIP.image_size,
        patch_size=SIGLIP.patch_size,
        hidden_act="gelu",
        vision_use_head=False,
    )
    config = DeepseekVLConfig(
        text_config=text,
        vision_config=tower,
        image_token_id=IMAGE_TOKEN,
        tie_word_embeddings=False,
        attn_implementation="sdpa",
    )
    return DeepseekVLForConditionalGeneration(config)


def copy_weights(model: Model, peer: nn.Module) -> None:
    """Ours into transformers' model."""
    ours = {_stored(name): tensor for name, tensor in model.chunks[0].module.state_dict().items()}
    theirs: dict[str, Tensor] = {}
    for rule in TRANSFORMERS.rules(vision_model()):
        theirs |= zip(rule.theirs, rule.join.to_theirs(ours[rule.ours], vision_model()), strict=True)
    if isinstance(peer, LlamaForCausalLM):
        theirs = {name.replace("language_model.", ""): tensor for name, tensor in theirs.items()}
    wanted = peer.state_dict()
    peer.load_state_dict({name: theirs[name] for name in wanted})


def _stored(name: str) -> str:
    """In checkpoints norms belong to the linear layer that follows."""
    name = name.replace("input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight")
    return name.replace("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight")


def plain_loop(peer: Any, row: Row, precision: str) -> Callable[[], float]:
    """One step: zero, forward, loss, backward, clip, update."""
    for name, parameter in peer.named_parameters():
        parameter.requires_grad_("vision_model" not in name)
    trained = [parameter for parameter in peer.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        trained, lr=LEARNING_RATE, betas=BETAS, weight_decay=WEIGHT_DECAY, fused=True
    )
    pixels = {"pixel_values": (row.images_NCHW / 255 - 0.5) / 0.5} if len(row.images_NCHW) else {}

    def run() -> float:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            logits = peer(input_ids=row.tokens[None], use_cache=False, **pixels).logits[0]
        loss = cross_entropy(logits.float(), row.labels)
        loss.backward()
        nn.utils.clip_grad_norm_(trained, MAX_NORM)
        optimizer.step()
        return loss.item()

    return run


def same_loss(ours: float, theirs: float, precision: str) -> None:
    """Raises ValueError where the sides do not compute the same thing."""
    if abs(ours - theirs) > SAME_LOSS[precision] * theirs:
        raise ValueError(f"{precision}: our loss is {ours}, transformers' is {theirs}")


def goal_of(name: str, ours: Times, theirs: Times) -> tuple[Goal, list[str | float]]:
    ratio = paired_ratio(theirs.cpu, ours.cpu)
    sides = quartiles(ours.cpu), quartiles(theirs.cpu)
    goal = Goal(
        name=f"times as fast as transformers, {name}",
        ours=sides[0].median,
        peer=sides[1].median,
        unit="s",
        ratio=ratio.median,
        bound="at least",
        goal=NO_SLOWER,
    )
    return goal, [name, *map(str, sides), str(ratio)]


def main() -> None:
    warnings.filterwarnings("ignore", category=UserWarning)
    one_thread()
    torch.manual_seed(0)
    groups = join_alone()
    goals = []
    for precision in ("fp32", "bf16"):
        for name, image_tokens in (("text", 0), ("image", IMAGE_TOKENS)):
            row = random_row(LANGUAGE.vocab_size, NUM_TOKENS, 0, image_tokens, SIGLIP.image_size)
            model = build(vision_model(), groups, precision, TRAINED)
            peer = peer_model(with_image=image_tokens > 0)
            copy_weights(model, peer)
            ours, theirs = [row.microbatch()], plain_loop(peer, row, precision)
            same_loss(step(model, ours).loss, theirs(), precision)
            times = in_turns({"ours": lambda m=model, o=ours: step(m, o), "transformers": theirs}, ROUNDS)
            goal, cells = goal_of(f"{name}, {precision}", times["ours"], times["transformers"])
            goals.append(goal)
            print(table(HEADER, [cells]), end="\n\n", flush=True)
    print_goals("overhead", goals)


if __name__ == "__main__":
    run_benchmark(main)
