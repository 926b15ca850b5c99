"""An evaluation between two steps changes nothing of the training; bad input ends it on all ranks alike."""

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_vl.config.errors import UserError
from megatron_vl.config.parallel import ParallelConfig, RecomputeConfig
from megatron_vl.data.sample import Message, Sample
from megatron_vl.evaluate.evaluator import Evaluator
from megatron_vl.evaluate.items import ImageFile, Item
from megatron_vl.parallel.gradients import parameters_at_rest
from megatron_vl.train.step import Vote, train_step
from tests.support.evaluation import content_rule
from tests.support.ranks import run_ranks
from tests.support.tiny_data import picture, write_tokenizer
from tests.support.training import IMAGE_TOKEN, TOKENS_PER_IMAGE, Case, batch, build

IMAGE_SIZE = 256  # of the tiny model


def ask(key: str, text: str, *images: bytes) -> Item:
    files = tuple(ImageFile(name=f"{n}.png", data=data) for n, data in enumerate(images))
    return Item(
        key=key,
        prompt=Sample(messages=(Message(role="user", content=text),)),
        images=files,
        options=("a", "bar"),
    )


TEXT = Item(key="text", prompt=Sample(text="words and words"))
ITEMS = (ask("picture", "<image>what?", picture()), ask("words", "which words?"))


def build_evaluator(chunks: list[Any], groups: Any, tokenizer: Path) -> Evaluator:
    content = content_rule(tokenizer, IMAGE_SIZE, TOKENS_PER_IMAGE)
    content.text.image_id = IMAGE_TOKEN  # what the tiny model takes for an image
    return Evaluator(chunks=chunks, groups=groups, content=content, sequence_length=128)


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What two steps of training left on one rank."""

    losses: list[float]
    weights: dict[str, Tensor]
    training: set[bool]  # the modes of all modules
    modules: list[str]
    answers: list[str]


def train(case: Case, tokenizer: Path | None) -> Trained:
    """Two steps, with an evaluation before and between them where there is a tokenizer."""
    chunks, optimizer, groups = build(case)
    optimizer.set_learning_rate(1e-3)
    losses, answers = [], list[str]()
    for step in (1, 2):
        if tokenizer is not None:
            evaluator = build_evaluator(chunks, groups, tokenizer)
            evaluator.bits_per_byte([TEXT])  # for one replica alone: the other must not be needed for it
            evaluator.choose(ITEMS)
            answers += evaluator.generate(ITEMS, max_new_tokens=3)
        losses.append(train_step(chunks, optimizer, batch(case, step, groups), groups, 1.0, Vote()).loss)
    with parameters_at_rest(chunks):
        weights = {
            f"{n}.{name}": parameter.detach().clone()
            for n, chunk in enumerate(chunks)
            for name, parameter in chunk.named_parameters()
        }
    modules = [module for chunk in chunks for module in chunk.modules()]
    return Trained(
        losses=losses,
        weights=weights,
        training={module.training for module in modules},
        modules=[type(module).__name__ for module in modules],
        answers=answers,
    )


@pytest.fixture(scope="module", name="tokenizer")
def write(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.json")


@pytest.mark.parametrize(
    "parallel",
    [ParallelConfig(overlap_grad_reduce=True, overlap_param_gather=True), ParallelConfig(pipeline_size=2)],
    ids=["dp2_overlapped", "pp2"],
)
def test_training_goes_on_bit_for_bit(parallel: ParallelConfig, tokenizer: Path) -> None:
    case = Case(parallel=parallel, recompute=RecomputeConfig(language="full", vision=True), num_rows=2)
    plain = run_ranks(2, train, case, None)
    evaluated = run_ranks(2, train, case, tokenizer)
    for before, after in zip(plain, evaluated, strict=True):
        assert after.losses == before.losses
        assert after.weights.keys() == before.weights.keys()
        for name, tensor in before.weights.items():
            assert torch.equal(after.weights[name], tensor), name
        assert (after.training, after.modules) == (before.training, before.modules)
        assert len(after.answers) == 2 * len(ITEMS) and after.answers == evaluated[0].answers


BROKEN = ask("broken", "<image>?", picture(40, 40, file_format="JPEG")[:-200])
NO_IMAGE = ask("no image", "<image>?", b"no image")
LONG = ask("long", "words " * 200)
REFUSED = {
    "choose": {
        "broken": (BROKEN, "item 'broken', option 0\" in 0.png: image cannot be decoded"),
        "long": (LONG, "item 'long', option 0 takes [0-9]+ positions; .* leave 128"),
        "blank": (replace(ITEMS[1], key="blank", options=("a", " ")), "item 'blank', option 1 is blank"),
        "bare": (replace(ITEMS[1], key="bare", options=()), "item 'bare' has no options"),
    },
    "generate": {
        "broken": (BROKEN, "item 'broken'\" in 0.png: image cannot be decoded"),
        "no image": (NO_IMAGE, "item 'no image': its image 0.png cannot be decoded"),
        "long": (LONG, "item 'long' with 3 new tokens takes [0-9]+ positions; .* leave 128"),
        "marks": (ask("marks", "<image>?"), "item 'marks' has 1 image marks for 0 images"),
    },
    "bits_per_byte": {"chat": (ITEMS[1], "item 'picture' is no plain text")},
}


def refusals(case: Case, tokenizer: Path) -> dict[str, str]:
    """What this rank is told of each bad item, which comes behind good ones."""
    chunks, _, groups = build(case)
    evaluator = build_evaluator(chunks, groups, tokenizer)
    calls: dict[str, Any] = {
        "choose": evaluator.choose,
        "generate": lambda items: evaluator.generate(items, max_new_tokens=3),
        "bits_per_byte": evaluator.bits_per_byte,
    }
    told = {}
    for method, bad in REFUSED.items():
        for name, (item, _) in bad.items():
            try:
                calls[method]([*ITEMS, item])
            except UserError as error:
                told[f"{method}.{name}"] = str(error)
    mine = ITEMS if dist.get_rank() else ITEMS[:1]
    try:
        evaluator.choose(mine)
    except RuntimeError as error:
        told["other items"] = str(error)
    return told


@pytest.mark.parametrize("parallel", [ParallelConfig(), ParallelConfig(pipeline_size=2)], ids=["dp2", "pp2"])
def test_bad_input_is_told_on_all_ranks(parallel: ParallelConfig, tokenizer: Path) -> None:
    for told in run_ranks(2, refusals, Case(parallel=parallel), tokenizer):
        for method, bad in REFUSED.items():
            for name, (_, message) in bad.items():
                assert re.search(message, told[f"{method}.{name}"])
        assert "ranks were given different items" in told["other items"]
