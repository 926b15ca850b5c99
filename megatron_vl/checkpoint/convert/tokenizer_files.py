"""What the tokenizer beside some weights says of special tokens, and the image token that a text-only one lacks."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_vl.checkpoint.convert.weight_files import read_json, read_json_if_there
from megatron_vl.checkpoint.description import TOKENIZER_FILE, TOKENIZER_FOLDER, Tokens
from megatron_vl.config.data import DataConfig
from megatron_vl.config.errors import UserError

TOKENIZER_CONFIG_FILE = "tokenizer_config.json"


@dataclass(kw_only=True)
class SourceTokens:
    """`num_entries`: the largest id + 1, 0 without a tokenizer. `added_image_token`: not in the source's file."""

    tokens: Tokens | None = None
    image_token_id: int | None = None
    num_entries: int = 0
    added_image_token: bool = False
    notices: list[str] = field(default_factory=list)


def read_source_tokens(folder: Path, image_token_id: int | None) -> SourceTokens:
    """The special tokens of a source. `image_token_id` is what its config.json says; None: a text-only model's,
    whose tokenizer gets the image token as one more entry.

    Raises:
        UserError: tokenizer.json is broken.
    """
    if not (folder / TOKENIZER_FILE).is_file():
        return SourceTokens(
            image_token_id=image_token_id,
            notices=[f"{folder} has no {TOKENIZER_FILE}: give data.tokenizer when you train"],
        )
    ids = _token_ids(folder / TOKENIZER_FILE)
    config = read_json_if_there(folder / TOKENIZER_CONFIG_FILE)
    defaults = DataConfig()
    found = SourceTokens(image_token_id=image_token_id, num_entries=max(ids.values(), default=-1) + 1)
    bos, eos = (_special(config, ids, name, getattr(defaults, name)) for name in ("bos_token", "eos_token"))
    image = _image_token(config, ids, image_token_id, defaults.image_token)
    if image is None and image_token_id is None:
        image, found.image_token_id, found.added_image_token = defaults.image_token, found.num_entries, True
        found.notices.append(f"the tokenizer got {image} as entry {found.num_entries}")
        found.num_entries += 1
    elif image is not None:
        found.image_token_id = ids[image]
    if bos is None or eos is None or image is None:
        found.notices.append(
            f"{folder / TOKENIZER_FILE} does not tell its special tokens (bos {bos}, eos {eos}, image {image}): "
            "give data.bos_token, data.eos_token and data.image_token when you train"
        )
    else:
        found.tokens = Tokens(bos_token=bos, eos_token=eos, image_token=image)
    return found


def add_image_token(checkpoint: Path, found: SourceTokens) -> None:
    """Add the image token to the tokenizer that a checkpoint carries."""
    if not found.added_image_token or found.tokens is None:
        return
    path = checkpoint / TOKENIZER_FOLDER / TOKENIZER_FILE
    content = read_json(path)
    content.setdefault("added_tokens", []).append(
        {
            "id": found.image_token_id,
            "content": found.tokens.image_token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
    )
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def _token_ids(path: Path) -> dict[str, int]:
    content = read_json(path)
    try:
        vocabulary = content["model"]["vocab"]
        if not isinstance(vocabulary, Mapping):  # a unigram model lists tokens with their scores
            vocabulary = {entry[0]: number for number, entry in enumerate(vocabulary)}
        ids: dict[str, int] = dict(vocabulary)
        ids |= {token["content"]: token["id"] for token in content.get("added_tokens", [])}
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is no tokenizer.json ({error!r})") from error
    for token, number in ids.items():
        if type(number) is not int or number < 0:
            raise UserError(f"{path} is no tokenizer.json: the id of {token!r} is {number!r}")
    return ids


def _special(config: Mapping[str, Any], ids: Mapping[str, int], name: str, default: str) -> str | None:
    """A token by its field in tokenizer_config.json, where it is a string or an object with its content."""
    value = config.get(name, default)
    token = value.get("content") if isinstance(value, Mapping) else value
    return token if isinstance(token, str) and token in ids else None


def _image_token(
    config: Mapping[str, Any], ids: Mapping[str, int], image_token_id: int | None, default: str
) -> str | None:
    if image_token_id is not None:
        return next((token for token, number in ids.items() if number == image_token_id), None)
    return _special(config, ids, "image_token", default)
