"""Items, and an evaluator over a model with given weights at any parallel setting; for ranks, so without transformers.

Shapes: S tokens of a row, B = 1, V vocabulary, N images, C channels, H W pixels.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_vl.config.evaluate import NORMALIZATIONS
from megatron_vl.config.model import ModelConfig
from megatron_vl.config.parallel import ParallelConfig, RecomputeConfig
from megatron_vl.data.image_tokens import ImageTokens
from megatron_vl.data.images import ImageRule, decode_image
from megatron_vl.data.loader import ContentRule
from megatron_vl.data.microbatch import Microbatch
from megatron_vl.data.sample import Message, Sample
from megatron_vl.evaluate.evaluator import Choice, Evaluator, SequenceScore, TextBits
from megatron_vl.evaluate.items import ImageFile, Item
from megatron_vl.evaluate.sequences import option_sequences
from megatron_vl.model.initialize import global_names
from megatron_vl.model.transformer_config import Division, transformer_config
from megatron_vl.model.vlm import BuildOptions, build_chunks
from megatron_vl.parallel.groups import Groups, build_groups
from megatron_vl.parallel.pipeline import run_forward
from megatron_vl.planning.layout import resolve_layout
from megatron_vl.planning.topology import Topology
from tests.support.tiny_data import picture, text_rule

ROW = 96


@dataclass(frozen=True, kw_only=True)
class Setup:
    """A model's weights by our names, whole; its tokenizer; the parallel setting to run it at."""

    model: ModelConfig
    weights: Mapping[str, Tensor]
    tokenizer: Path
    image_size: int
    tokens_per_image: int
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    max_cached_positions: int = 16384


def content_rule(tokenizer: Path, image_size: int, tokens_per_image: int) -> ContentRule:
    return ContentRule(
        text=text_rule(tokenizer),
        image=ImageRule(size=image_size, mean=(0.48145466, 0.4578275, 0.40821073), max_pixels=100_000),
        image_tokens=ImageTokens(tokens_per_image=tokens_per_image),
        max_sample_bytes=100_000,
    )


def build_evaluator(setup: Setup) -> Evaluator:
    """This rank's evaluator; its chunks are not wrapped. To be called on ranks of `run_ranks`."""
    parallel = setup.parallel
    topology = Topology(
        world_size=dist.get_world_size(),
        tensor_size=parallel.tensor_size,
        pipeline_size=parallel.pipeline_size,
        virtual_size=parallel.virtual_size,
    )
    groups = build_groups(topology, seed=1, device=torch.device("cpu"))
    layout = resolve_layout(parallel.layout, setup.model.language.num_layers, topology)
    division = Division(topology=topology, layout=layout, sequence_parallel=parallel.sequence_parallel)
    config = transformer_config(setup.model.language, division, RecomputeConfig(), "fp32")
    content = content_rule(setup.tokenizer, setup.image_size, setup.tokens_per_image)
    options = BuildOptions(image_token=content.text.image_id)
    chunks = build_chunks(config, setup.model, options, groups.collection, groups.device)
    fill(chunks, setup.weights, groups)
    return Evaluator(
        chunks=chunks,
        groups=groups,
        content=content,
        sequence_length=ROW,
        max_cached_positions=setup.max_cached_positions,
    )


@torch.no_grad()
def fill(chunks: list[Any], weights: Mapping[str, Tensor], groups: Groups) -> None:
    """Give this rank's chunks their part of whole weights."""
    rank, size = groups.tensor_rank, groups.topology.tensor_size
    for chunk in chunks:
        names = global_names(chunk)
        for name, parameter in chunk.named_parameters():
            whole = weights[names[name]]
            if size > 1 and getattr(parameter, "tensor_model_parallel", False):
                dim, stride = parameter.partition_dim, parameter.partition_stride
                whole = torch.cat(whole.chunk(size * stride, dim)[rank::size], dim)
            parameter.copy_(whole)


def image(seed: int) -> ImageFile:
    return ImageFile(name=f"{seed}.png", data=picture(40, 30 + seed, seed=seed))


def chat(*contents: str) -> Sample:
    roles = ("user", "assistant") * len(contents)
    return Sample(messages=tuple(Message(role=r, content=c) for r, c in zip(roles, contents, strict=False)))


MAX_NEW_TOKENS = 12
OPTIONS = ("a red bar", "the blue line of words", "words")
ITEMS = (
    Item(key="one image", prompt=chat("<image>what is in the picture?"), images=(image(1),), options=OPTIONS),
    Item(key="two images", prompt=chat("<image> or <image>?"), images=(image(2), image(3)), options=OPTIONS),
    Item(key="no image", prompt=chat("is a bar blue?"), options=("yes", "no, it is red")),
    Item(
        key="document", prompt=Sample(text="the picture shows"), options=("a line", "words and words", "图片")
    ),
    Item(key="few shots", prompt=chat("a bar?", "the line", "<image>?"), images=(image(4),), options=OPTIONS),
)
LONG_TEXT = Item(key="long", prompt=Sample(text="the picture of a blue line shows words, " * 12))
SHORT_TEXT = Item(key="short", prompt=Sample(text="图片 words"))


@dataclass(frozen=True, kw_only=True)
class Results:
    """What one rank's evaluator says of the items."""

    scores: list[SequenceScore]
    choices: list[Choice]
    bits: list[TextBits]
    answers: list[str]


def evaluate(setup: Setup) -> Results:
    evaluator = build_evaluator(setup)
    sequences = [sequence for item in ITEMS for sequence in option_sequences(item, evaluator.content)]
    return Results(
        scores=evaluator.score(sequences),
        choices=evaluator.choose(ITEMS),
        bits=evaluator.bits_per_byte([LONG_TEXT, SHORT_TEXT]),
        answers=evaluator.generate(ITEMS, MAX_NEW_TOKENS),
    )


def choose_by_each(setup: Setup) -> dict[str, list[Choice]]:
    evaluator = build_evaluator(setup)
    return {name: evaluator.choose(ITEMS, name) for name in NORMALIZATIONS}


def generate(setup: Setup) -> list[str]:
    return build_evaluator(setup).generate(ITEMS, MAX_NEW_TOKENS)


def evaluate_one(setup: Setup) -> tuple[list[TextBits], list[str]]:
    """A single text and a single prompt: with several replicas, all but one have nothing to do."""
    evaluator = build_evaluator(setup)
    return evaluator.bits_per_byte([SHORT_TEXT]), evaluator.generate(ITEMS[:1], MAX_NEW_TOKENS)


def answer_by_recomputing(setup: Setup) -> list[str]:
    """Greedy answers without a cache: for each token, the whole sequence goes through the model again."""
    evaluator = build_evaluator(setup)
    content, answers = evaluator.content, []
    for item in ITEMS:
        prompt, answer = prompt_tokens(item, content), list[int]()
        images_NCHW = pixels(item, content.image)
        while len(answer) < MAX_NEW_TOKENS:
            row = whole_row(prompt + answer, images_NCHW)
            (logits_SBV,) = run_forward(evaluator.chunks, [row], evaluator.groups)
            latest = int(logits_SBV[-1, 0].argmax())
            if latest == content.text.eos_id:
                break
            answer.append(latest)
        answers.append(content.text.decode(answer).strip())
    return answers


def whole_row(tokens: list[int], images_NCHW: Tensor) -> Microbatch:
    """One sequence as a row."""
    return Microbatch(
        cu_seqlens=torch.tensor([0, len(tokens)], dtype=torch.int32),
        max_seqlen=len(tokens),
        num_images=len(images_NCHW),
        units=(),
        segment_units=(),
        tokens_1S=torch.tensor([tokens]),
        images_NCHW=images_NCHW,
        labels_1S=None,
        loss_mask_1S=None,
    )


def pixels(item: Item, rule: ImageRule) -> Tensor:
    """An item's images, uint8 [N, 3, H, W]."""
    decoded = [torch.tensor(decode_image(image.read(), rule, "", "")) for image in item.images]
    return torch.stack(decoded) if decoded else torch.zeros(0, 3, rule.size, rule.size)


def prompt_tokens(item: Item, content: ContentRule) -> list[int]:
    """What an answer continues."""
    per_image = [content.image_tokens.tokens_per_image] * len(item.images)
    return content.text.encode_prompt(item.prompt, per_image).tolist()
