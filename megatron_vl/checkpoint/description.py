"""What a checkpoint's weights are: the model's shape and its tokens, beside the tensors. No torch.

Every checkpoint, trained or imported, holds `model.json` and, where there is one, the folder `tokenizer/`; so it can
be evaluated and exported alone.
"""

import json
import shutil
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megatron_vl.config.errors import UserError
from megatron_vl.config.model import ModelConfig

DESCRIPTION_FILE = "model.json"
TOKENIZER_FOLDER = "tokenizer"
TOKENIZER_FILE = "tokenizer.json"
# What comes with a tokenizer, and goes where it goes. A source's processor settings do not: they name classes of its
# own layout, and an export writes them from the model.
CARRIED_FILES = (
    TOKENIZER_FILE,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)
# Fields of a model that say how it computes or begins, not what its weights are.
NOT_OF_WEIGHTS = ("model.name", "model.vision.max_images_per_forward", "model.language.init_std")


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """The special tokens and the chat template that the weights were trained with."""

    bos_token: str
    eos_token: str
    image_token: str
    chat_template: str = "deepseek"


@dataclass(frozen=True, kw_only=True)
class Description:
    """`image_token_id` stands for an image in the token sequence; `tokens` is None where no tokenizer came along."""

    model: ModelConfig
    image_token_id: int
    tokens: Tokens | None


def write_description(folder: Path, description: Description, tokenizer_folder: Path | None) -> None:
    """Put model.json into a checkpoint that is being written, and what there is of CARRIED_FILES."""
    text = json.dumps(asdict(description), indent=1, ensure_ascii=False)
    (folder / DESCRIPTION_FILE).write_text(text + "\n", encoding="utf-8")
    if tokenizer_folder is not None:
        carry_tokenizer(tokenizer_folder, folder / TOKENIZER_FOLDER)


def carry_tokenizer(source: Path, target: Path) -> list[str]:
    """Copy what there is of CARRIED_FILES, and return their names; no folder is made for none."""
    found = [name for name in CARRIED_FILES if (source / name).is_file()]
    for name in found:
        target.mkdir(exist_ok=True)
        shutil.copyfile(source / name, target / name)
    return found


def read_description(checkpoint: Path) -> Description:
    """What the weights of a checkpoint are.

    Raises:
        UserError: `checkpoint` is no checkpoint, or its description is broken.
    """
    path = checkpoint / DESCRIPTION_FILE
    if not path.is_file():
        raise UserError(
            f"{checkpoint} is not a checkpoint: it has no {DESCRIPTION_FILE}; give a folder such as "
            "runs/NAME/checkpoints/joint-00000350, or what launch.convert has written"
        )
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        model: Any = OmegaConf.to_object(
            OmegaConf.merge(OmegaConf.structured(ModelConfig), OmegaConf.create(values["model"]))
        )
        tokens = None if values["tokens"] is None else Tokens(**values["tokens"])
        return Description(model=model, image_token_id=int(values["image_token_id"]), tokens=tokens)
    except (ValueError, KeyError, TypeError, OmegaConfBaseException) as error:
        raise UserError(f"{path} is broken: {error}") from error


def check_same_weights(checkpoint: Path, stored: ModelConfig, wanted: ModelConfig) -> None:
    """Raise UserError, naming every field, where a checkpoint's weights have another shape than the model's."""
    differences = [
        f"{name}={want} (the checkpoint has {have})"
        for name, have, want in _differences(stored, wanted, "model")
        if name not in NOT_OF_WEIGHTS
    ]
    if differences:
        raise UserError(f"{checkpoint} does not hold this model's weights: {'; '.join(differences)}")


def _differences(stored: Any, wanted: Any, path: str) -> list[tuple[str, Any, Any]]:
    if type(stored) is type(wanted) and hasattr(stored, "__dataclass_fields__"):
        return [
            difference
            for field in fields(stored)
            for difference in _differences(
                getattr(stored, field.name), getattr(wanted, field.name), f"{path}.{field.name}"
            )
        ]
    return [] if stored == wanted else [(path, stored, wanted)]
