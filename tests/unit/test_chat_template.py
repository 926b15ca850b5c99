"""The chat template against the official ones; what they differ in is stated here, and which one is followed.

Official code: deepseek_vl/utils/conversation.py and deepseek_vl/models/processing_vlm.py of DeepSeek-VL at 681bffb,
which is what is followed. transformers: CHAT_TEMPLATE in convert_deepseek_vl_weights_to_hf.py (4.54 and later), the
chat_template of deepseek-community/deepseek-vl-1.3b-chat and -7b-chat. They differ in these:

- transformers always begins with the default system prompt, and gives a system message of the conversation a turn of
  its own, "System: …<eos>", after it. The official code has one system prompt, which `set_system_message` replaces.
- transformers leaves out the end of sentence of a last answer, unless a generation prompt follows.
- Neither holds the begin of sentence: the tokenizer of both puts it first.
"""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from data_tools.raw.conversations import read_conversation
from megatron_vl.data.sample import IMAGE_MARK, Message, Sample
from megatron_vl.data.text import TextRule
from tests.support.tiny_data import BOS, EOS, IMAGE, text_rule, write_tokenizer

TOKENS_PER_IMAGE = 3
DEFAULT_SYSTEM = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the "
    "user provides, and assist the user with a variety of tasks using natural language."
)
# What transformers' template does, in other words; `eos_token` where that spells out <｜end▁of▁sentence｜>.
TRANSFORMERS_TEMPLATE = (
    """
{%- macro spoken(parts) -%}
  {%- for part in parts -%}
    {%- if part.type == 'image' -%}{{ image_token }}
    {%- else -%}
      {%- set words = part.text.lstrip() if loop.first else part.text -%}
      {{- words.rstrip() if loop.last else words -}}
    {%- endif -%}
  {%- endfor -%}
{%- endmacro -%}
{{- '"""
    + DEFAULT_SYSTEM
    + """' + '\n\n' -}}
{%- for turn in messages -%}
  {{- turn.role | capitalize + ': ' + spoken(turn.content) -}}
  {%- if add_generation_prompt or not loop.last -%}
    {{- '\n\n' if turn.role == 'user' else eos_token -}}
  {%- endif -%}
{%- endfor -%}
{{- 'Assistant:' if add_generation_prompt else '' -}}
"""
)
CONVERSATIONS = {
    "one turn": [("user", "What is it?"), ("assistant", "A red bar.")],
    "image first": [("user", f"{IMAGE_MARK}\nWhat is it?"), ("assistant", "A red bar.\n\nAnd a line.")],
    "image last": [("user", f" What is it?\n{IMAGE_MARK} "), ("assistant", " A bar. ")],
    "images": [("user", f"{IMAGE_MARK}{IMAGE_MARK} or\n{IMAGE_MARK}?"), ("assistant", "图片")],
    "turns": [
        ("user", f"{IMAGE_MARK}\nWhat?"),
        ("assistant", "A bar."),
        ("user", f"\nAnd {IMAGE_MARK}?\n"),
        ("assistant", "Words."),
        ("user", "Sure?"),
        ("assistant", "Yes"),
    ],
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.json")


@pytest.fixture(scope="module")
def rule(tokenizer: Path) -> TextRule:
    return text_rule(tokenizer)


@pytest.fixture(scope="module")
def peer(tokenizer: Path) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_file=str(tokenizer),
        bos_token=BOS,
        eos_token=EOS,
        extra_special_tokens={"image_token": IMAGE},
        chat_template=TRANSFORMERS_TEMPLATE,
    )


def sample(turns: list[tuple[str, str]], system: str | None = None) -> Sample:
    turns = [("system", system), *turns] if system is not None else turns
    return Sample(messages=tuple(Message(role=role, content=content) for role, content in turns))


def ours(rule: TextRule, turns: list[tuple[str, str]], system: str | None = None) -> list[int]:
    conversation = sample(turns, system)
    return rule.encode(conversation, [TOKENS_PER_IMAGE] * conversation.num_images).tokens.tolist()


def in_parts(content: str) -> list[dict[str, str]]:
    """A message's content as transformers takes it."""
    parts: list[dict[str, str]] = []
    for number, text in enumerate(content.split(IMAGE_MARK)):
        parts += [{"type": "image"}] if number else []
        parts += [{"type": "text", "text": text}] if text else []
    return parts


def rendered(peer: PreTrainedTokenizerFast, turns: list[tuple[str, str]], **options: bool) -> str:
    messages = [{"role": role, "content": in_parts(content)} for role, content in turns]
    return str(peer.apply_chat_template(messages, tokenize=False, image_token=IMAGE, **options))


def as_tokens(peer: PreTrainedTokenizerFast, text: str) -> list[int]:
    text = text.replace(IMAGE, IMAGE * TOKENS_PER_IMAGE)  # as the processor does it
    return list(peer(BOS + text, add_special_tokens=False).input_ids)


def official(turns: list[tuple[str, str]], system: str) -> str:
    """conversation.py's separators, and the stripping of processing_vlm.py, for a whole conversation."""
    text = f"{system}\n\n" if system else ""
    for role, content in turns:
        text += f"{role.capitalize()}: {content.strip()}" + ("\n\n" if role == "user" else EOS)
    return text.replace(IMAGE_MARK, IMAGE)


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_equals_transformers_with_its_system_prompt(
    name: str, rule: TextRule, peer: PreTrainedTokenizerFast
) -> None:
    turns = CONVERSATIONS[name]
    text = rendered(peer, turns)
    assert not text.endswith(EOS)  # transformers ends without, to be continued
    assert ours(rule, turns, DEFAULT_SYSTEM) == as_tokens(peer, text + EOS)
    continued = rendered(peer, turns, add_generation_prompt=True)
    assert ours(rule, turns, DEFAULT_SYSTEM) == as_tokens(peer, continued.removesuffix("Assistant:"))


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_prompts_equal_transformers(name: str, rule: TextRule, peer: PreTrainedTokenizerFast) -> None:
    turns = CONVERSATIONS[name][:-1]
    prompt = sample(turns, DEFAULT_SYSTEM)
    found = rule.encode_prompt(prompt, [TOKENS_PER_IMAGE] * prompt.num_images).tolist()
    assert found == as_tokens(peer, rendered(peer, turns, add_generation_prompt=True))


@pytest.mark.parametrize("system", ["", "Be brief."])
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_equals_the_official_code(
    name: str, system: str, rule: TextRule, peer: PreTrainedTokenizerFast
) -> None:
    turns = CONVERSATIONS[name]
    assert ours(rule, turns, system or None) == as_tokens(peer, official(turns, system))


def test_where_transformers_differs(rule: TextRule, peer: PreTrainedTokenizerFast) -> None:
    """A conversation's own system message is no turn, in the official code and here."""
    turns = CONVERSATIONS["one turn"]
    text = rendered(peer, [("system", "Be brief."), *turns])
    assert text == f"{DEFAULT_SYSTEM}\n\nSystem: Be brief.{EOS}User: What is it?\n\nAssistant: A red bar."
    assert official(turns, "Be brief.") == f"Be brief.\n\nUser: What is it?\n\nAssistant: A red bar.{EOS}"


PIECES = st.sampled_from([*"aA .\n0é图🙂:", "User:", "Assistant:", "picture", IMAGE, EOS, BOS, "<imag"])
WORDS = st.lists(PIECES, min_size=1, max_size=12).map("".join).filter(str.strip)


@given(
    questions=st.lists(st.tuples(WORDS, st.integers(0, 2)), min_size=1, max_size=3),
    answers=st.lists(WORDS, min_size=3, max_size=3),
    system=st.one_of(st.just(""), WORDS),
)
def test_supervised_are_the_answers_and_their_ends(
    rule: TextRule, questions: list[tuple[str, int]], answers: list[str], system: str
) -> None:
    """From a record to token ids: nothing else carries loss, whatever the texts say."""
    turns: list[dict[str, str]] = []
    for (question, num_images), answer in zip(questions, answers, strict=False):
        turns.append({"from": "human", "value": f"{IMAGE_MARK}\n" * num_images + question})
        turns.append({"from": "gpt", "value": answer})
    num_images = sum(number for _, number in questions)
    conversation = read_conversation({"conversations": turns, "image": ["a.jpg"] * num_images}, system)
    whole = sample([(message["role"], message["content"]) for message in conversation.fields["messages"]])
    encoded = rule.encode(whole, [TOKENS_PER_IMAGE] * num_images)
    supervised = encoded.tokens[encoded.supervised].tolist()
    assert not {rule.bos_id, rule.image_id} & set(supervised)  # decoding would hide them
    found, run = [], []
    for token in supervised:
        if token == rule.eos_id:
            found.append(rule.decode(run))
            run = []
        else:
            run.append(token)
    assert found == [f" {answer.strip()}" for answer in answers[: len(questions)]]
    assert not run
    assert (encoded.tokens == rule.image_id).sum() == TOKENS_PER_IMAGE * num_images
