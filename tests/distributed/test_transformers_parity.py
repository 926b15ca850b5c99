"""What transformers computes with a model, we compute after importing it: logits, loss and every gradient.

Shapes: S tokens, V vocabulary, N images, C channels, H W pixels.
"""

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_vl.checkpoint.convert.importing import import_model
from megatron_vl.checkpoint.convert.layouts import TRANSFORMERS
from megatron_vl.checkpoint.description import read_description
from megatron_vl.checkpoint.opening import open_model
from megatron_vl.config.parallel import ParallelConfig
from megatron_vl.data.microbatch import Microbatch
from megatron_vl.device.machine import pick_device
from megatron_vl.parallel.gradients import distribute
from megatron_vl.parallel.pipeline import run_forward, run_microbatches
from tests.support.ranks import run_ranks
from tests.support.releases import (
    IMAGE_TOKEN_ID,
    KINDS,
    TOKENS_PER_IMAGE,
    VOCAB_SIZE,
    image_size,
    pixel_inputs,
    release,
    stored_name,
)
from tests.support.training import gather

TOLERANCE = 1e-5
ROUNDING = 2e-8  # of the whole gradient's norm
SETTINGS = {
    "one": (1, ParallelConfig()),
    "tp2": (2, ParallelConfig(tensor_size=2)),
    "tp2_sp": (2, ParallelConfig(tensor_size=2, sequence_parallel=True)),
    "pp2": (2, ParallelConfig(pipeline_size=2)),
}
# Where images stand among text: "t" is a run of text, "i" an image.
PATTERNS = {"text": "t", "one image": "it", "several images": "iiit", "interleaved": "titit"}


@dataclass(frozen=True)
class Sequence:
    """Tokens [S], labels [S] (-100: none) and the images of one sample."""

    tokens: Tensor
    labels: Tensor
    images_NCHW: Tensor


@dataclass(frozen=True)
class Computed:
    """Logits [S, V] by pattern, the loss per supervised token, gradients by transformers' names."""

    logits: dict[str, Tensor]
    loss: float
    gradients: dict[str, Tensor]


def sequence(kind: str, pattern: str, seed: int) -> Sequence:
    source = torch.Generator().manual_seed(seed)
    parts = [
        torch.full((TOKENS_PER_IMAGE,), IMAGE_TOKEN_ID)
        if piece == "i"
        else torch.randint(3, VOCAB_SIZE, (7,), generator=source)
        for piece in pattern
    ]
    tokens = torch.cat(parts)
    labels = torch.randint(3, VOCAB_SIZE, tokens.shape, generator=source)
    labels[tokens == IMAGE_TOKEN_ID] = -100
    size = image_size(kind)
    images = torch.randint(0, 256, (pattern.count("i"), 3, size, size), generator=source, dtype=torch.uint8)
    return Sequence(tokens, labels, images)


@cache
def sequences(kind: str) -> dict[str, Sequence]:
    return {name: sequence(kind, pattern, seed) for seed, (name, pattern) in enumerate(PATTERNS.items())}


@cache
def released(kind: str) -> tuple[Path, Any]:
    """The imported checkpoint, and transformers' model."""
    folder = Path(mkdtemp(prefix="release-"))
    model = release(folder / "source", kind)
    import_model(folder / "source", folder / "checkpoint")
    return folder / "checkpoint", model


@cache
def reference(kind: str) -> Computed:
    """By transformers, one sequence at a time; the loss is over all supervised tokens."""
    _, model = released(kind)
    logits, loss_sum, num_tokens = {}, torch.zeros(()), 0
    for name, one in sequences(kind).items():
        images = pixel_inputs(kind, one.images_NCHW) if len(one.images_NCHW) else {}
        logits[name] = model(input_ids=one.tokens[None], **images).logits[0]
        loss_sum = loss_sum + torch.nn.functional.cross_entropy(logits[name], one.labels, reduction="sum")
        num_tokens += int((one.labels >= 0).sum())
    loss = loss_sum / num_tokens
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return Computed({name: value.detach() for name, value in logits.items()}, float(loss), gradients)


def microbatches(kind: str) -> list[Microbatch]:
    """Two packed rows, each with half of the sequences, padded to the same length."""
    every = list(sequences(kind).values())
    rows = [every[:2], every[2:]]
    length = max(sum(len(one.tokens) for one in row) for row in rows) + 1
    return [packed_row(row, length + length % 2) for row in rows]


def packed_row(row: list[Sequence], length: int) -> Microbatch:
    lengths = [len(one.tokens) for one in row]
    lengths.append(length - sum(lengths))
    padding = torch.full((lengths[-1],), 1)
    labels = torch.cat([*(one.labels for one in row), torch.full_like(padding, -100)])
    images = torch.cat([one.images_NCHW for one in row])
    return Microbatch(
        cu_seqlens=torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32),
        max_seqlen=max(lengths),
        num_images=len(images),
        units=(),
        segment_units=(),
        tokens_1S=torch.cat([*(one.tokens for one in row), padding])[None],
        images_NCHW=images,
        labels_1S=labels.clamp(min=0)[None],
        loss_mask_1S=(labels >= 0).float()[None],
    )


def compute(
    kind: str, checkpoint: Path, parallel: ParallelConfig
) -> tuple[list[Tensor], float, dict[str, Tensor]]:
    """On this rank: logits of the rows, loss, gradients by our names in checkpoints (each where it is held)."""
    opened = open_model(checkpoint, parallel, "fp32", pick_device(0))
    for chunk in opened.chunks:
        chunk.train()
    batches = microbatches(kind)
    unlabelled = [Microbatch(**{**vars(batch), "labels_1S": None}) for batch in batches]
    logits = run_forward(opened.chunks, unlabelled, opened.groups)
    chunks = distribute(opened.chunks, opened.config, parallel, opened.groups)
    for chunk in chunks:
        chunk.zero_grad_buffer()
    result = run_microbatches(chunks, batches, opened.groups)
    loss = float(result.loss_sum / result.num_tokens) if result.num_tokens else 0.0
    num_supervised = sum(int(batch.loss_mask_1S.sum()) for batch in batches if batch.loss_mask_1S is not None)
    sums = gather(chunks, opened.groups, True)
    gradients = {stored_name(name): value / num_supervised for name, value in sums.items()}
    return [row.squeeze(1) for row in logits], loss, gradients


# The simpler model in parallel is a slow test: the hybrid has all that it has.
CASES = [
    pytest.param(kind, setting, marks=pytest.mark.slow if kind == "deepseek_vl" and setting != "one" else ())
    for kind in KINDS
    for setting in SETTINGS
]


@pytest.mark.parametrize(("kind", "setting"), CASES)
def test_logits_loss_and_gradients(kind: str, setting: str) -> None:
    world_size, parallel = SETTINGS[setting]
    checkpoint, _ = released(kind)
    expected = reference(kind)
    ranks = run_ranks(world_size, compute, kind, checkpoint, parallel)
    rows, loss, _ = ranks[-1]
    ours = {name: value for _, _, gradients in ranks for name, value in gradients.items()}
    found = [
        logits for row, batch in zip(rows, microbatches(kind), strict=True) for logits in split(row, batch)
    ]
    for (name, logits), mine in zip(expected.logits.items(), found, strict=True):
        assert (mine - logits).abs().max() <= TOLERANCE * logits.abs().max(), name
    assert loss == pytest.approx(expected.loss, rel=TOLERANCE)
    model = read_description(checkpoint).model
    theirs = {
        name: part
        for rule in TRANSFORMERS.rules(model)
        for name, part in zip(rule.theirs, rule.join.to_theirs(ours.pop(rule.ours), model), strict=True)
    }
    assert not ours
    assert theirs.keys() == expected.gradients.keys()
    whole = torch.stack([gradient.norm() for gradient in expected.gradients.values()]).norm()
    for name, gradient in expected.gradients.items():
        # Keys' biases have a gradient of zero, of which rounding alone is left.
        limit = TOLERANCE * gradient.norm() + ROUNDING * whole
        assert (theirs[name] - gradient).norm() <= limit, name


def split(row_SV: Tensor, batch: Microbatch) -> list[Tensor]:
    """Without the padding segment at the end."""
    return list(row_SV.split(batch.cu_seqlens.diff().tolist()))[:-1]
