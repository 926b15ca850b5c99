"""Training steps of our own code in one process, on rows made up here, as benchmarks compare them with others'."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_vl.config.model import ModelConfig
from megatron_vl.config.root import PretrainConfig
from megatron_vl.config.train import StageConfig, TrainConfig
from megatron_vl.data.batch import PADDING as NO_UNIT
from megatron_vl.data.microbatch import Microbatch
from megatron_vl.device.machine import Device
from megatron_vl.parallel.groups import Groups, build_groups
from megatron_vl.planning.topology import Topology
from megatron_vl.train.settings import resolve_stages
from megatron_vl.train.stage import Model, Start, build_model
from megatron_vl.train.step import StepResult, Vote, train_step

IMAGE_TOKEN, PADDING = 1, 0
FIRST_WORD = 2  # token ids from here on are words
LEARNING_RATE, WEIGHT_DECAY, MAX_NORM = 1e-4, 0.1, 1.0


@dataclass(frozen=True)
class Row:
    """Tokens [S], labels [S] (-100: none) and the images of one sample that fills a row."""

    tokens: Tensor
    labels: Tensor
    images_NCHW: Tensor

    def microbatch(self) -> Microbatch:
        num_tokens = len(self.tokens)
        return Microbatch(
            cu_seqlens=torch.tensor([0, num_tokens], dtype=torch.int32),
            max_seqlen=num_tokens,
            num_images=len(self.images_NCHW),
            units=(),
            segment_units=(NO_UNIT,),
            tokens_1S=self.tokens[None],
            images_NCHW=self.images_NCHW,
            labels_1S=self.labels.clamp(min=0)[None],
            loss_mask_1S=(self.labels >= 0).float()[None],
        )


def random_row(
    vocab_size: int, num_tokens: int, seed: int, image_tokens: int = 0, image_size: int = 0
) -> Row:
    """Words; with `image_tokens` an image of `image_size` pixels stands before them."""
    source = torch.Generator().manual_seed(seed)
    words = torch.randint(FIRST_WORD, vocab_size, (num_tokens + 1,), generator=source)
    tokens, labels = words[:-1].clone(), words[1:].clone()
    tokens[:image_tokens] = IMAGE_TOKEN
    labels[:image_tokens] = -100
    shape = (1 if image_tokens else 0, 3, image_size, image_size)
    return Row(tokens, labels, torch.randint(0, 256, shape, generator=source, dtype=torch.uint8))


def join_alone() -> Groups:
    """A world of one rank, this process, with the groups of a run in it."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    return build_groups(Topology(world_size=1), seed=1, device=torch.device("cpu"))


def build(model: ModelConfig, groups: Groups, precision: str, train: Sequence[str]) -> Model:
    """The model with its optimizer as a run builds them; `train` are the parts that learn."""
    stage = StageConfig(
        train=list(train),
        steps=1,
        global_batch_size=1,
        sequence_length=model.language.max_positions,
        learning_rate=LEARNING_RATE,
    )
    config = PretrainConfig(
        model=model,
        stages=["joint"],
        train=TrainConfig(precision=precision, weight_decay=WEIGHT_DECAY, gradient_clip=MAX_NORM),
    )
    config.stage = replace(config.stage, joint=stage)
    (settings,) = resolve_stages(config, world_size=1)
    built = build_model(config, settings, groups, Device("cpu"), IMAGE_TOKEN, Start())
    built.optimizer.set_learning_rate(LEARNING_RATE)
    return built


def step(model: Model, microbatches: list[Microbatch]) -> StepResult:
    """One optimizer step."""
    return train_step(model.chunks, model.optimizer, microbatches, model.groups, MAX_NORM, Vote())
