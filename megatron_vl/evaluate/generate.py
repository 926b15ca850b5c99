"""Greedy answers to prompts, at any parallel setting.

Prompts are dealt to data-parallel ranks in turn. Each replica answers its own, some at a time; replicas wait for
each other once, at the end. Shapes: N images.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.utils import unwrap_model
from torch import Tensor

from megatron_vl.data.loader import ContentRule
from megatron_vl.evaluate.items import Progress, no_progress
from megatron_vl.evaluate.sequences import TokenSequence, decode_images, raise_together
from megatron_vl.model.generation import (
    KeyValueCache,
    Row,
    cached_attention,
    next_tokens,
    prompt_row,
    run_chunk,
    token_row,
)
from megatron_vl.model.vlm import VisionLanguageModel
from megatron_vl.parallel.gradients import parameters_at_rest
from megatron_vl.parallel.groups import Groups
from megatron_vl.parallel.pipeline import run_chain

DECODE_THREADS = 4


@dataclass(frozen=True, kw_only=True)
class Generator:
    """Answers prompts with up to `max_new_tokens` tokens each.

    The sequences of a batch, each as long as the longest one with its answer, have at most `max_cached_positions`
    positions; a longer sequence is a batch of its own.
    """

    chunks: list[Any]
    groups: Groups
    content: ContentRule
    max_new_tokens: int
    max_cached_positions: int
    progress: Progress = no_progress

    def answer(self, prompts: Sequence[TokenSequence]) -> list[list[int]]:
        """Each prompt's answer without the end of sentence, on all ranks. Collective over the world.

        Raises UserError, on all ranks, where an image cannot be used.
        """
        groups, errors = self.groups, list[str]()
        mine = range(groups.data_rank, len(prompts), groups.topology.data_size)
        answers: dict[int, list[int]] = {}
        modules: list[VisionLanguageModel] = unwrap_model(self.chunks)
        with parameters_at_rest(self.chunks), _evaluating(modules):
            for batch in self._batches({number: len(prompts[number].encoded.tokens) for number in mine}):
                found = self._answer_batch([prompts[number] for number in batch], modules, errors)
                answers |= zip(batch, found, strict=True)
                self.progress(len(answers), len(mine))
        raise_together(errors)
        replicas: list[dict[int, list[int]]] = [{}] * groups.topology.data_size
        dist.all_gather_object(replicas, answers, group=groups.collection.dp)
        everyone = {number: answer for replica in replicas for number, answer in replica.items()}
        return [everyone[number] for number in range(len(prompts))]

    def _batches(self, lengths: dict[int, int]) -> Iterator[list[int]]:
        """Numbers of prompts, by their lengths, longest first: those of a batch should be alike."""
        batch: list[int] = []
        for number in sorted(lengths, key=lengths.__getitem__, reverse=True):
            longest = lengths[batch[0] if batch else number] + self.max_new_tokens
            if (len(batch) + 1) * longest > self.max_cached_positions and batch:
                yield batch
                batch = []
            batch.append(number)
        if batch:
            yield batch

    def _answer_batch(
        self, prompts: list[TokenSequence], modules: list[VisionLanguageModel], errors: list[str]
    ) -> list[list[int]]:
        device, text = self.groups.device, self.content.text
        multiple = self.groups.topology.tensor_size  # sequence parallelism divides a row between the ranks
        tokens = [prompt.encoded.tokens.tolist() for prompt in prompts]
        lengths = [len(of_prompt) for of_prompt in tokens]
        cache = KeyValueCache(lengths, max(lengths) + self.max_new_tokens, device)
        answers: list[list[int]] = [[] for _ in prompts]
        active = list(range(len(prompts)))
        row = prompt_row(tokens, self._images(prompts, errors), multiple, text.eos_id, device)
        with cached_attention(modules, cache):
            for _ in range(self.max_new_tokens):
                latest = self._run(row, modules, cache)
                going_on = [place for place, token in enumerate(latest) if token != text.eos_id]
                active, latest = [active[place] for place in going_on], [latest[place] for place in going_on]
                for number, token in zip(active, latest, strict=True):
                    answers[number].append(token)
                if not active:
                    break
                if len(active) < len(cache.lengths):
                    cache.keep(going_on)
                row = token_row(latest, cache, multiple, text.eos_id, device)
        return answers

    def _run(self, row: Row, modules: list[VisionLanguageModel], cache: KeyValueCache) -> list[int]:
        """The token that follows each sequence, on all ranks of the replica."""
        groups, config = self.groups, modules[0].config
        num_positions = row.num_tokens // (groups.topology.tensor_size if config.sequence_parallel else 1)
        hidden_SBH = run_chain(
            modules,
            lambda chunk, received: run_chunk(chunk, received, row, cache.capacity),
            (num_positions, 1, config.hidden_size),
            groups,
        )
        tokens_B = torch.empty(len(row.ends), dtype=torch.int64, device=groups.device)
        if hidden_SBH is not None:
            tokens_B = next_tokens(modules[-1], hidden_SBH, row.ends)
        last_stage = dist.get_process_group_ranks(groups.collection.pp)[-1]
        dist.broadcast(tokens_B, last_stage, group=groups.collection.pp)
        if row.packed is None:
            cache.advance()
        tokens: list[int] = tokens_B.tolist()
        return tokens

    def _images(self, prompts: list[TokenSequence], errors: list[str]) -> Tensor | None:
        """All images of a batch, uint8 [N, 3, size, size], on the first pipeline stage."""
        if not self.groups.is_first_stage or not any(prompt.images for prompt in prompts):
            return None
        with ThreadPoolExecutor(DECODE_THREADS) as threads:
            decoded = list(threads.map(lambda prompt: decode_images(prompt, self.content.image), prompts))
        errors += [str(error) for _, error in decoded if error is not None]
        return torch.from_numpy(np.stack([image for images, _ in decoded for image in images]))


@contextmanager
def _evaluating(modules: list[VisionLanguageModel]) -> Iterator[None]:
    """Without gradients and in evaluation mode; afterwards in the mode before.

    Not in inference mode: the rotary table that is cached here would then break the next backward pass.
    """
    training = [module.training for module in modules]
    try:
        for module in modules:
            module.eval()
        with torch.no_grad():
            yield
    finally:
        for module, mode in zip(modules, training, strict=True):
            module.train(mode)
