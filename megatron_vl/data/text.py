"""From samples to token ids and their supervision: tokenizer, chat template, image marks."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from megatron_vl.config.errors import UserError
from megatron_vl.data.sample import IMAGE_MARK, Sample

# What each template makes of a conversation, in words whose hash is the template's fingerprint. A change of
# `_turns` is a change of the words, so that an index made with the old template is refused.
CHAT_TEMPLATES = {
    "deepseek": "v1: stripped contents; system\\n\\n, then per turn User: user\\n\\nAssistant:[ answer eos]; "
    "what is in brackets carries loss; nothing between turns"
}
ASSISTANT = "Assistant:"


@dataclass(frozen=True, kw_only=True)
class EncodedSample:
    """A whole sample as ids (int64 [T]) and, per id, whether it carries loss as a label (bool [T])."""

    tokens: NDArray[np.int64]
    supervised: NDArray[np.bool_]


@dataclass(frozen=True)
class _Turn:
    """Text up to an end of sentence, and the ascending spans of its characters that carry loss."""

    text: str
    supervised: tuple[tuple[int, int], ...]


class TextRule:
    """Everything that decides how a sample's text becomes tokens; two fingerprints identify it.

    A special token that is written out in a sample's text is tokenised as ordinary characters.

    `bos_id`, `eos_id`, `image_id` are token ids, `vocab_size` is the largest id + 1; `tokenizer_fingerprint`
    and `template_fingerprint` are sha256 digests in hex.
    """

    def __init__(
        self,
        tokenizer: str | Path,
        *,
        bos_token: str,
        eos_token: str,
        image_token: str,
        chat_template: str = "deepseek",
    ) -> None:
        """`tokenizer` is the path of a Hugging Face tokenizer.json.

        Raises UserError where the file is missing or no tokenizer, lacks one of the tokens or cannot keep it
        apart from text, and where the template is unknown.
        """
        self._settings = (str(tokenizer), bos_token, eos_token, image_token, chat_template)
        if chat_template not in CHAT_TEMPLATES:
            raise UserError(f"data.chat_template is {chat_template!r}; valid: {', '.join(CHAT_TEMPLATES)}")
        content = _read_tokenizer(Path(tokenizer))
        specials = {"data.bos_token": bos_token, "data.eos_token": eos_token, "data.image_token": image_token}
        self._tokenizer = _build_tokenizer(content, set(specials.values()), Path(tokenizer))
        ids = [self._special_id(field, token) for field, token in specials.items()]
        self.bos_id, self.eos_id, self.image_id = ids
        if self.image_id in (self.bos_id, self.eos_id):
            raise UserError(
                f"data.image_token is {image_token!r}; it must differ from bos_token and eos_token"
            )
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        canonical = json.dumps([content, *specials.values()], sort_keys=True)
        self.tokenizer_fingerprint = hashlib.sha256(canonical.encode()).hexdigest()
        self.template_fingerprint = hashlib.sha256(CHAT_TEMPLATES[chat_template].encode()).hexdigest()

    @property
    def fingerprints(self) -> dict[str, str]:
        """What an index says of the rule that its tokens were counted by."""
        return {"tokenizer": self.tokenizer_fingerprint, "chat template": self.template_fingerprint}

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, self._settings

    def count_text_tokens(self, samples: Sequence[Sample]) -> list[int]:
        """Text and end-of-sentence tokens of each sample: its sequence without bos and image tokens."""
        turns = [_turns(sample) for sample in samples]
        pieces = [
            [piece for turn in of_sample for piece in turn.text.split(IMAGE_MARK)] for of_sample in turns
        ]
        flat = [piece for of_sample in pieces for piece in of_sample]
        encodings = iter(self._tokenizer.encode_batch_fast(flat, add_special_tokens=False))
        return [
            len(of_sample) + sum(len(next(encodings)) for _ in of_pieces)
            for of_sample, of_pieces in zip(turns, pieces, strict=True)
        ]

    def encode(self, sample: Sample, tokens_per_image: Sequence[int]) -> EncodedSample:
        """[bos] + text, image i as `tokens_per_image[i]` image tokens, + [eos] (chat: eos after each answer).

        A token carries loss where any of its characters does, an eos where the character before it does, an
        image token never. Raises ValueError where `tokens_per_image` is not one number per image mark.
        """
        if len(tokens_per_image) != sample.num_images:
            raise ValueError(f"{len(tokens_per_image)} images were given for {sample.num_images} image marks")
        tokens, supervised = [np.array([self.bos_id])], [np.array([False])]
        image = 0
        for turn in _turns(sample):
            carries_loss = _character_mask(turn)
            position = 0
            for order, piece in enumerate(turn.text.split(IMAGE_MARK)):
                if order > 0:
                    tokens.append(np.full(tokens_per_image[image], self.image_id))
                    supervised.append(np.zeros(tokens_per_image[image], dtype=np.bool_))
                    image += 1
                    position += len(IMAGE_MARK)
                encoding = self._tokenizer.encode(piece, add_special_tokens=False)
                tokens.append(np.array(encoding.ids, dtype=np.int64))
                supervised.append(_supervised_tokens(encoding.offsets, carries_loss[position:][: len(piece)]))
                position += len(piece)
            tokens.append(np.array([self.eos_id]))
            supervised.append(carries_loss[-1:])
        return EncodedSample(
            tokens=np.concatenate(tokens).astype(np.int64),
            supervised=np.concatenate(supervised).astype(np.bool_),
        )

    def encode_prompt(self, sample: Sample, tokens_per_image: Sequence[int]) -> NDArray[np.int64]:
        """What a model continues (int64 [T]): a document without its eos; a conversation up to `Assistant:`.

        Such a conversation ends with its user's message, which `parse_sample` refuses for training.
        """
        return self.encode(sample, tokens_per_image).tokens[:-1]

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of token ids, special tokens left out."""
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=True))

    def _special_id(self, field: str, token: str) -> int:
        token_id = self._tokenizer.token_to_id(token)
        if token_id is None:
            raise UserError(f"data.tokenizer {self._settings[0]} has no token {token!r}, which {field} names")
        if token_id in self._tokenizer.encode(token, add_special_tokens=False).ids:
            raise UserError(
                f"data.tokenizer {self._settings[0]} makes {token!r} ({field}) of ordinary text; "
                "it must be one of its added tokens"
            )
        return int(token_id)


def _rebuild(
    tokenizer: str, bos_token: str, eos_token: str, image_token: str, chat_template: str
) -> TextRule:
    return TextRule(
        tokenizer,
        bos_token=bos_token,
        eos_token=eos_token,
        image_token=image_token,
        chat_template=chat_template,
    )


def _read_tokenizer(path: Path) -> dict[str, Any]:
    """The file's content without what is no part of a text's tokens: truncation, padding, and the post-processor,
    which adds special tokens (as `TextRule.encode` does) and trims spaces off the offsets.
    """
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"data.tokenizer is {path}: {error.strerror}; it must be a tokenizer.json") from error
    except ValueError as error:
        raise UserError(f"data.tokenizer is {path}, which is no JSON ({error})") from error
    added = content.get("added_tokens") if isinstance(content, dict) else None
    if not isinstance(added, list) or not all(isinstance(token, dict) for token in added):
        raise UserError(f"data.tokenizer is {path}, which is no Hugging Face tokenizer.json")
    return {**content, "truncation": None, "padding": None, "post_processor": None}


def _build_tokenizer(content: dict[str, Any], specials: set[str], path: Path) -> Tokenizer:
    """A tokenizer that never makes one of `specials` of text: only tokens marked special can be held back."""
    added = [
        token | {"special": True} if token.get("content") in specials else token
        for token in content["added_tokens"]
    ]
    try:
        tokenizer = Tokenizer.from_str(json.dumps(content | {"added_tokens": added}))
    except Exception as error:  # the library raises nothing narrower
        raise UserError(f"data.tokenizer is {path}, which `tokenizers` cannot read ({error})") from error
    tokenizer.encode_special_tokens = True
    return tokenizer


def _turns(sample: Sample) -> list[_Turn]:
    """The texts that an eos ends. An answer's loss begins at its space: prompts end with `Assistant:`."""
    if sample.text is not None:
        return [
            _Turn(sample.text, ((0, len(sample.text)),) if sample.supervised is None else sample.supervised)
        ]
    turns, prompt = [], ""
    for message in sample.messages:
        content = message.content.strip()
        if message.role == "assistant":
            text = f"{prompt}{ASSISTANT} {content}"
            turns.append(_Turn(text, ((len(prompt) + len(ASSISTANT), len(text)),)))
            prompt = ""
        else:
            prompt += f"User: {content}\n\n" if message.role == "user" else f"{content}\n\n"
    if prompt:
        turns.append(_Turn(prompt + ASSISTANT, ()))
    return turns


def _character_mask(turn: _Turn) -> NDArray[np.bool_]:
    mask = np.zeros(len(turn.text), dtype=np.bool_)
    for start, end in turn.supervised:
        mask[start:end] = True
    return mask


def _supervised_tokens(offsets: list[tuple[int, int]], carries_loss: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Per token, whether any of its characters carries loss."""
    if not offsets:
        return np.zeros(0, dtype=np.bool_)
    num_before: NDArray[np.int64] = np.concatenate([[0], np.cumsum(carries_loss)])
    start, end = np.array(offsets).T
    supervised: NDArray[np.bool_] = num_before[end] > num_before[start]
    return supervised
