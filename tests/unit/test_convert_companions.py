"""What lies beside exported weights is of the model and its tokens, whatever lay beside the source's."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from megatron_vl.checkpoint.convert.exporting import export_model
from megatron_vl.checkpoint.convert.importing import import_model
from megatron_vl.checkpoint.convert.tokenizer_files import add_image_token, read_source_tokens
from megatron_vl.config.errors import UserError
from tests.support.releases import IMAGE_TOKEN_ID, LOW_SIZE, TOKENS_PER_IMAGE, release
from tests.support.tiny_data import BOS, EOS, IMAGE

BOS_ID, EOS_ID = 0, 1  # of tiny_data's tokenizer


def write(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(values))


def official(folder: Path) -> None:
    """The names in the released repositories of the official layout."""
    write(folder / "processor_config.json", processor_class="VLChatProcessor", num_image_tokens=576)
    write(
        folder / "preprocessor_config.json",
        processor_class="VLChatProcessor",
        image_processor_type="VLMImageProcessor",
        image_size=LOW_SIZE,
    )
    text_only_tokenizer(folder)


def text_only_tokenizer(folder: Path) -> None:
    write(
        folder / "tokenizer_config.json",
        add_bos_token=True,
        bos_token={"__type": "AddedToken", "content": BOS},
        eos_token={"__type": "AddedToken", "content": EOS},
        pad_token=None,
        processor_class="VLChatProcessor",
        tokenizer_class="LlamaTokenizerFast",
        chat_template="of another model",
    )


def no_image_processor(folder: Path) -> None:
    write(folder / "processor_config.json", processor_class="DeepseekVLProcessor", num_image_tokens=576)


def no_processor(folder: Path) -> None:
    write(folder / "preprocessor_config.json", image_processor_type="DeepseekVLImageProcessor")


@pytest.mark.parametrize("beside", [official, text_only_tokenizer, no_image_processor, no_processor])
def test_a_processor_loads_whatever_lay_beside_the_source(
    beside: Callable[[Path], None], tmp_path: Path
) -> None:
    release(tmp_path / "source", "deepseek_vl")
    beside(tmp_path / "source")
    import_model(tmp_path / "source", tmp_path / "checkpoint")
    export_model(tmp_path / "checkpoint", tmp_path / "export")
    processor = AutoProcessor.from_pretrained(tmp_path / "export")
    content = [{"type": "image", "image": Image.new("RGB", (60, 30))}, {"type": "text", "text": "What?"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True, return_dict=True
    )
    ids = inputs["input_ids"][0].tolist()
    assert ids.count(IMAGE_TOKEN_ID) == TOKENS_PER_IMAGE
    assert [place for place, number in enumerate(ids) if number == BOS_ID] == [0]
    assert inputs["pixel_values"].shape == (1, 3, LOW_SIZE, LOW_SIZE)
    assert (processor.tokenizer.image_token, processor.tokenizer.pad_token) == (IMAGE, EOS)


@pytest.mark.parametrize(
    ("carried", "end"),
    [
        ({"eos_token_id": 2, "temperature": 0.7}, EOS_ID),  # as LlamaConfig's defaults leave it
        ({"eos_token_id": [EOS_ID, 7]}, [EOS_ID, 7]),
        ({}, EOS_ID),
    ],
)
def test_generation_ends_at_the_tokenizers_end(carried: dict[str, Any], end: Any, tmp_path: Path) -> None:
    release(tmp_path / "source", "deepseek_vl")
    write(tmp_path / "source" / "generation_config.json", **carried)
    import_model(tmp_path / "source", tmp_path / "checkpoint")
    export_model(tmp_path / "checkpoint", tmp_path / "export")
    config = AutoModelForImageTextToText.from_pretrained(tmp_path / "export").generation_config
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (BOS_ID, end, EOS_ID)
    assert config.temperature == carried.get("temperature")


@pytest.mark.parametrize("vocabulary", [{BOS: 0, EOS: 1, "a": 2}, [[BOS, 0.0], [EOS, 0.0], ["a", -1.0]]])
def test_the_image_token_follows_the_last_entry(vocabulary: Any, tmp_path: Path) -> None:
    (tmp_path / "tokenizer").mkdir()
    write(tmp_path / "tokenizer" / "tokenizer.json", model={"vocab": vocabulary})
    write(tmp_path / "tokenizer" / "tokenizer_config.json", bos_token=BOS, eos_token=EOS)
    found = read_source_tokens(tmp_path / "tokenizer", None)
    add_image_token(tmp_path, found)
    (added,) = json.loads((tmp_path / "tokenizer" / "tokenizer.json").read_text())["added_tokens"]
    assert (added["id"], added["content"], found.num_entries) == (3, IMAGE, 4)


@pytest.mark.parametrize("number", ["1", -1, True])
def test_an_id_that_is_none_is_named(number: Any, tmp_path: Path) -> None:
    write(tmp_path / "tokenizer.json", model={"vocab": {BOS: 0, EOS: number}})
    with pytest.raises(UserError, match=f"id of '{EOS}' is {number!r}"):
        read_source_tokens(tmp_path, None)
