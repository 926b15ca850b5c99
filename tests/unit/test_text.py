"""Tokens and supervision of a sample: special tokens, image marks, character spans, the chat template."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_vl.config.errors import UserError
from megatron_vl.data.sample import IMAGE_MARK, Message, Sample
from megatron_vl.data.text import TextRule
from tests.support.tiny_data import BOS, EOS, IMAGE, text_rule, write_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.json")


@pytest.fixture(scope="module")
def rule(tokenizer: Path) -> TextRule:
    return text_rule(tokenizer)


@pytest.fixture(scope="module")
def trimming_rule(tokenizer: Path) -> TextRule:
    content = json.loads(tokenizer.read_text())
    trim = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    path = tokenizer.with_name("trimming.json")
    path.write_text(json.dumps(content | {"post_processor": trim}))
    return text_rule(path)


def chat(*contents: str, system: str | None = None) -> Sample:
    roles = ["user", "assistant"] * len(contents)
    messages = [Message(role=role, content=content) for role, content in zip(roles, contents, strict=False)]
    return Sample(messages=(*([Message(role="system", content=system)] if system else []), *messages))


def readable(rule: TextRule, tokens: np.ndarray) -> str:
    """Tokens as text, the special ones by name."""
    names = {rule.bos_id: BOS, rule.eos_id: EOS, rule.image_id: "<I>"}
    text, run = "", []
    for token in [*tokens.tolist(), rule.bos_id]:
        if token in names:
            text += rule.decode(run) + names[token]
            run = []
        else:
            run.append(token)
    return text.removesuffix(BOS)


def test_a_document_is_framed_and_its_images_become_their_tokens(rule: TextRule) -> None:
    encoded = rule.encode(Sample(text="<image>red <image><image> bar 图"), [2, 0, 3])
    assert readable(rule, encoded.tokens) == f"{BOS}<I><I>red <I><I><I> bar 图{EOS}"
    not_supervised = (encoded.tokens == rule.image_id) | (encoded.tokens == rule.bos_id)
    np.testing.assert_array_equal(encoded.supervised, ~not_supervised)


def test_the_chat_template_is_the_papers(rule: TextRule) -> None:
    encoded = rule.encode(chat(" <image>What? ", "A bar.\n", "Sure?", "Yes.", system="Be brief."), [1])
    assert readable(rule, encoded.tokens) == (
        f"{BOS}Be brief.\n\nUser: <I>What?\n\nAssistant: A bar.{EOS}User: Sure?\n\nAssistant: Yes.{EOS}"
    )
    assert readable(rule, encoded.tokens[encoded.supervised]) == f" A bar.{EOS} Yes.{EOS}"


def test_a_prompt_is_what_the_answer_continues(rule: TextRule) -> None:
    whole = rule.encode(chat("What?", "A bar."), [])
    prompt = rule.encode_prompt(chat("What?"), [])
    np.testing.assert_array_equal(prompt, whole.tokens[: len(prompt)])
    assert not whole.supervised[: len(prompt)].any()
    assert whole.supervised[len(prompt) :].all()
    assert readable(rule, rule.encode_prompt(Sample(text="def f():"), [])) == f"{BOS}def f():"


PARTS = st.sampled_from([*"aA .\n0é图🙂", "picture", IMAGE_MARK, IMAGE, EOS, BOS])
TEXT = st.lists(PARTS, min_size=1, max_size=30).map("".join)


@given(text=TEXT, data=st.data())
def test_supervision_follows_the_characters(rule: TextRule, text: str, data: st.DataObject) -> None:
    """Against an oracle that counts the bytes of tokens: those of supervised characters are supervised."""
    start = data.draw(st.integers(0, len(text) - 1))
    end = data.draw(st.integers(start + 1, len(text)))
    per_image = [2] * text.count(IMAGE_MARK)
    encoded = rule.encode(Sample(text=text, supervised=((start, end),)), per_image)
    flags = iter(encoded.supervised[1:])
    position, chars = 0, list(text)
    for number, piece in enumerate(text.split(IMAGE_MARK)):
        if number:
            assert [next(flags), next(flags)] == [False, False]
            position += len(IMAGE_MARK)
        owners = [position + index for index, char in enumerate(piece) for _ in char.encode()]  # of each byte
        byte = 0
        for token in rule.encode(Sample(text=piece), []).tokens[1:-1] if piece else []:
            width = num_bytes(rule, int(token))
            owned = owners[byte : byte + width]
            assert next(flags) == any(start <= owner < end for owner in owned), (chars, owned)
            byte += width
        assert byte == len(owners)
        position += len(piece)
    assert next(flags) == (end == len(text))
    assert next(flags, None) is None


def num_bytes(rule: TextRule, token: int) -> int:
    """A byte-level vocabulary spells one byte per character."""
    entry = rule._tokenizer.id_to_token(token)
    assert entry is not None
    return len(entry)


@given(text=TEXT, data=st.data())
def test_a_tokenizer_that_trims_its_offsets_supervises_the_same(
    rule: TextRule, trimming_rule: TextRule, text: str, data: st.DataObject
) -> None:
    """Many tokenizer files trim spaces off what a token is said to cover."""
    start = data.draw(st.integers(0, len(text) - 1))
    span = ((start, data.draw(st.integers(start + 1, len(text)))),)
    per_image = [1] * text.count(IMAGE_MARK)
    plain, trimming = (
        each.encode(Sample(text=text, supervised=span), per_image) for each in (rule, trimming_rule)
    )
    np.testing.assert_array_equal(trimming.tokens, plain.tokens)
    np.testing.assert_array_equal(trimming.supervised, plain.supervised)


@given(texts=st.lists(TEXT, min_size=1, max_size=4))
def test_text_tokens_are_all_but_bos_and_images(rule: TextRule, texts: list[str]) -> None:
    chats = [chat(f"x{text}", f"y{text}", "and?", "z") for text in texts]
    samples = [*(Sample(text=text) for text in texts), *chats]
    for sample, count in zip(samples, rule.count_text_tokens(samples), strict=True):
        encoded = rule.encode(sample, [3] * sample.num_images)
        assert count == len(encoded.tokens) - 1 - 3 * sample.num_images


@given(text=TEXT)
def test_special_tokens_in_text_stay_text(rule: TextRule, text: str) -> None:
    encoded = rule.encode(Sample(text=text), [0] * text.count(IMAGE_MARK))
    specials = [
        token for token in encoded.tokens.tolist() if token in (rule.bos_id, rule.eos_id, rule.image_id)
    ]
    assert specials == [rule.bos_id, rule.eos_id]
    assert rule.decode(encoded.tokens.tolist()) == text.replace(IMAGE_MARK, "")


def test_added_tokens_that_are_not_marked_special_stay_text_too(tokenizer: Path, tmp_path: Path) -> None:
    content = json.loads(tokenizer.read_text())
    for token in content["added_tokens"]:
        token["special"] = False
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(content))
    rule = text_rule(path)
    assert rule.image_id not in rule.encode(Sample(text=f"a {IMAGE} b"), []).tokens


def test_truncation_and_padding_of_the_file_are_not_applied(
    tokenizer: Path, tmp_path: Path, rule: TextRule
) -> None:
    content = json.loads(tokenizer.read_text())
    content["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(content, indent=3))
    changed = text_rule(path)
    sample = Sample(text="a rather long document of words")
    np.testing.assert_array_equal(changed.encode(sample, []).tokens, rule.encode(sample, []).tokens)
    # The same tokens: the same fingerprint.
    assert changed.tokenizer_fingerprint == rule.tokenizer_fingerprint


def test_the_fingerprint_changes_with_vocabulary_and_special_tokens(tmp_path: Path, rule: TextRule) -> None:
    other_vocabulary = text_rule(write_tokenizer(tmp_path / "a.json", text="entirely other words words"))
    other_eos = text_rule(write_tokenizer(tmp_path / "b.json"), eos_token=BOS)
    same = text_rule(write_tokenizer(tmp_path / "c.json"))
    fingerprints = [each.tokenizer_fingerprint for each in (rule, same, other_vocabulary, other_eos)]
    assert fingerprints[0] == fingerprints[1]
    assert len(set(fingerprints)) == 3


def test_a_copy_in_another_process_is_the_same(rule: TextRule) -> None:
    copy = pickle.loads(pickle.dumps(rule))
    sample = Sample(text=f"the picture {EOS}")
    assert copy.tokenizer_fingerprint == rule.tokenizer_fingerprint
    np.testing.assert_array_equal(copy.encode(sample, []).tokens, rule.encode(sample, []).tokens)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"image_token": "<picture>"}, "has no token '<picture>', which data.image_token names"),
        ({"eos_token": "zzz"}, "has no token 'zzz', which data.eos_token names"),
        ({"eos_token": "a"}, r"makes 'a' \(data.eos_token\) of ordinary text"),
        ({"image_token": EOS}, "data.image_token is '<eos>'; it must differ"),
        ({"chat_template": "vicuna"}, "data.chat_template is 'vicuna'; valid: deepseek"),
    ],
)
def test_wrong_settings_are_named(tokenizer: Path, change: dict[str, str], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        text_rule(tokenizer, **change)


@pytest.mark.parametrize("content", [None, b"\x00", b"[]", b'{"added_tokens": []}', b'{"added_tokens": [1]}'])
def test_a_file_that_is_no_tokenizer_is_named(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=f"data.tokenizer is {path}"):
        text_rule(path)


def test_counts_of_images_and_marks_must_agree(rule: TextRule) -> None:
    with pytest.raises(ValueError, match="1 images were given for 2 image marks"):
        rule.encode(Sample(text="<image><image>"), [4])
