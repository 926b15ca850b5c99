"""Our model's training step against megatron-core's own LLaVAModel with its SigLIP tower, at the same sizes.

Rows of 1024 tokens, 576 of them an image's, the tower frozen, in fp32; both sides are trained by our step, so only the
model and megatron-core's reductions differ. LLaVAModel as it ships (stock attention, rotary positions and SwiGLU), and
given scaled_dot_product_attention. One thread, medians of repeats in turns. Ends within 6 minutes.
"""

import warnings

import torch
from torch import nn

from benchmarks.one_process import LEARNING_RATE, build, join_alone, random_row, step
from benchmarks.paired import in_turns, one_thread, paired_ratio, quartiles
from benchmarks.report import Goal, print_goals, run_benchmark, table
from benchmarks.sizes import IMAGE_TOKENS, LANGUAGE, NUM_TOKENS, SIGLIP, TRAINED, vision_model
from benchmarks.stock_llava import LlavaChunk, llava, stock_collectives
from megatron_vl.config.parallel import ParallelConfig
from megatron_vl.config.train import TrainConfig
from megatron_vl.data.microbatch import Microbatch
from megatron_vl.parallel.gradients import distribute
from megatron_vl.parallel.groups import Groups
from megatron_vl.train.optimizer import build_optimizer
from megatron_vl.train.stage import Model

ROUNDS = 7
FASTER = {"as it ships": 1.5, "given SDPA": 1.0}


def peer(groups: Groups, sdpa: bool) -> Model:
    """LLaVAModel with a frozen tower, wrapped and optimised as ours is."""
    chunk = LlavaChunk(llava(groups, sdpa), groups)
    for name, parameter in chunk.named_parameters():
        nn.init.normal_(parameter, 1.0 if "norm" in name and name.endswith("weight") else 0.0, 0.02)
        parameter.requires_grad_(not name.startswith("llava.vision_model."))
    parallel = ParallelConfig()
    chunks = distribute([chunk], chunk.config, parallel, groups)
    optimizer = build_optimizer(chunks, TrainConfig(precision="fp32"), parallel, 1.0, groups.device)
    optimizer.set_learning_rate(LEARNING_RATE)
    return Model(chunks=chunks, optimizer=optimizer, groups=groups, spread=None)


def peer_step(model: Model, rows: list[Microbatch]) -> None:
    with stock_collectives():
        step(model, rows)


def num_parameters(model: Model) -> int:
    return sum(parameter.numel() for parameter in model.chunks[0].parameters())


def main() -> None:
    warnings.filterwarnings("ignore", category=UserWarning)
    one_thread()
    torch.manual_seed(0)
    groups = join_alone()
    models = {
        "ours": build(vision_model(), groups, "fp32", TRAINED),
        "as it ships": peer(groups, sdpa=False),
        "given SDPA": peer(groups, sdpa=True),
    }
    rows = [random_row(LANGUAGE.vocab_size, NUM_TOKENS, 0, IMAGE_TOKENS, SIGLIP.image_size).microbatch()]
    for name, model in models.items():
        if num_parameters(model) != num_parameters(models["ours"]):
            raise ValueError(
                f"{name}: {num_parameters(model)} parameters, ours {num_parameters(models['ours'])}"
            )
    stock = {name: lambda m=models[name]: peer_step(m, rows) for name in FASTER}
    times = in_turns({"ours": lambda: step(models["ours"], rows)} | stock, ROUNDS)
    ours = quartiles(times["ours"].cpu)
    goals, cells = [], [["ours", str(ours), ""]]
    for name, bound in FASTER.items():
        ratio, theirs = paired_ratio(times[name].cpu, times["ours"].cpu), quartiles(times[name].cpu)
        cells.append([name, str(theirs), str(ratio)])
        goals.append(
            Goal(
                name=f"times as fast as LLaVAModel {name}",
                ours=ours.median,
                peer=theirs.median,
                unit="s",
                ratio=ratio.median,
                bound="at least",
                goal=bound,
            )
        )
    print(table(["CPU seconds: median [quartiles]", "", "ratio [95 %]"], cells), end="\n\n")
    print_goals("llava_peer", goals)


if __name__ == "__main__":
    run_benchmark(main)
