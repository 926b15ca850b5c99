"""What the quickstart's recipe decides and draws, checked against what is inside, not against itself."""

import io
import json
import random
import re
import sysconfig
from collections import Counter
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tokenizers import Tokenizer

from data_tools.quickstart import figures, pages, recipe
from data_tools.quickstart.photographs import installed_photographs
from data_tools.quickstart.text import common_words, installation_documents
from data_tools.quickstart.tokenizer import train_tokenizer
from data_tools.recipe import Part
from megatron_vl.config.errors import UserError

LIBRARY = Path(sysconfig.get_paths()["stdlib"])
SIZE = recipe.Size(
    documents=40,
    questions=80,
    pages=200,
    figures=14,
    heldout_documents=10,
    heldout_questions=8,
    heldout_pages=12,
    heldout_figures=6,
)
DRAWN_FIGURES = figures.draw_figures(12, random.Random(7))


@pytest.fixture(scope="module")
def parts() -> dict[str, Part]:
    """The recipe over a small piece of the library, by the parts' first folders."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recipe, "installation_documents", lambda: installation_documents(LIBRARY / "asyncio"))
        return {part.folders[0]: part for part in recipe.quickstart(SIZE).parts()}


def target_texts(part: Part) -> list[list[str]]:
    """Per folder of a part, what each sample teaches: its text, or the answers of its conversation."""
    texts: list[list[str]] = [[] for _ in part.folders]
    for draft in part.drafts:
        for of_folder, (record,) in zip(texts, part.render(draft).records, strict=True):
            messages = record.fields.get("messages", [])
            answers = [message["content"] for message in messages if message["role"] == "assistant"]
            of_folder.append("\n".join(sorted(answers)) or record.fields["text"])
    return texts


def test_sizes_are_as_asked(parts: dict[str, Part]) -> None:
    counts = {folder: len(part.drafts) for folder, part in parts.items()}
    photographs = counts.pop("photographs")
    assert counts == {
        "text": 40,
        "heldout/text": 10,
        "chat_text": 80,
        "heldout/chat_text": 8,
        "pages": 200,
        "heldout/pages": 12,
        "figures": 14,
        "heldout/figures": 6,
    }
    assert photographs >= 20


def test_usual_size_has_5000_training_images_and_200_of_each_kind_held_out() -> None:
    size = recipe.Size()
    assert size.pages + size.figures >= 5000
    assert size.heldout_pages >= 200
    assert size.heldout_figures >= 200


@pytest.mark.parametrize("source", ["text", "chat_text", "pages", "figures"])
def test_no_heldout_text_is_a_training_text(parts: dict[str, Part], source: str) -> None:
    train, heldout = target_texts(parts[source]), target_texts(parts[f"heldout/{source}"])
    for of_train, of_heldout in zip(train, heldout, strict=True):
        assert not set(of_train) & set(of_heldout)
        assert len(set(of_heldout)) == len(of_heldout)


def test_heldout_answers_are_from_heldout_documents(parts: dict[str, Part]) -> None:
    documents = "\n".join(text for (text,) in zip(*target_texts(parts["text"]), strict=True))
    for (answer,) in zip(*target_texts(parts["heldout/chat_text"]), strict=True):
        assert answer not in documents


def test_heldout_pages_combine_words_that_training_pages_have(parts: dict[str, Part]) -> None:
    words = {word for text in parts["pages"].drafts for word in text.split()}
    for text in parts["heldout/pages"].drafts:
        assert len(text.split()) >= 2
        assert set(text.split()) <= words


def test_words_of_pages_occur_in_the_installation(parts: dict[str, Part]) -> None:
    documents = " ".join(document.text for document in installation_documents(LIBRARY / "asyncio"))
    words = {word for text in parts["pages"].drafts for word in text.split()}
    assert all(re.search(rf"\b{word}\b", documents) and 2 <= len(word) <= 5 for word in words)


def test_recipe_decides_the_same_again(parts: dict[str, Part], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipe, "installation_documents", lambda: installation_documents(LIBRARY / "asyncio"))
    again = recipe.quickstart(SIZE).parts()
    assert [(part.folders, list(part.drafts)) for part in again] == [
        (part.folders, list(part.drafts)) for part in parts.values()
    ]


def test_library_without_sources_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipe, "installation_documents", lambda: installation_documents(tmp_path))
    with pytest.raises(UserError, match="0 documents with 0 common words, 40 are needed"):
        recipe.quickstart(SIZE).parts()


def test_version_changes_with_the_size() -> None:
    assert recipe.quickstart().version == recipe.quickstart().version != recipe.quickstart(SIZE).version


def test_documents_are_public_docstrings(tmp_path: Path) -> None:
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "skipped.py").write_text(f'"""Not read.{" Really." * 40}"""')
    (tmp_path / "shapes").mkdir()
    (tmp_path / "shapes" / "__init__.py").write_text(
        f'"""All about shapes.{" Shapes are good." * 20}"""\n'
        'class Square:\n    """A square."""\n'
        '    def area(self, unit: str = "m") -> float:\n        """Its area."""\n'
        '    def _hidden(self):\n        """Private."""\n'
        "def bare(): pass\n"
    )
    (document,) = installation_documents(tmp_path)
    assert [entry.name for entry in document.entries] == ["shapes", "shapes.Square", "shapes.Square.area"]
    assert document.text.endswith(
        "class shapes.Square\nA square.\n\nshapes.Square.area(self, unit: str='m')\nIts area."
    )


def test_documents_have_a_reasonable_length_and_differ() -> None:
    texts = [document.text for document in installation_documents(LIBRARY / "pydoc_data")]
    assert len(texts) > 100  # the language reference
    assert min(map(len, texts)) >= 200
    assert np.median([len(text) for text in texts]) < 2000
    assert len(set(texts)) == len(texts)


def test_common_words_by_count_then_alphabet() -> None:
    texts = ["the cat, the dog and the cat", "a self.cat cat(1) the_end Cat longer"]
    assert common_words(texts, 3, 5) == ["the", "cat", "and"]


@pytest.mark.parametrize("figure", DRAWN_FIGURES, ids=lambda figure: figure.kind)
def test_code_executed_anew_draws_the_stored_picture(figure: figures.Figure) -> None:
    stored = np.asarray(Image.open(io.BytesIO(figures.render_figure(figure.code))))
    file = io.BytesIO()
    with plt.style.context(["default", figures.STYLE]):
        exec(compile(figure.code, "figure.py", "exec"), {"__name__": "__main__"})
        plt.savefig(file)
        plt.close("all")
    again = np.asarray(Image.open(file).convert("RGB"))
    assert stored.shape == (256, 256, 3)
    np.testing.assert_array_equal(stored, again)


def test_code_has_five_or_six_lines_and_says_what_the_answers_say() -> None:
    for figure in DRAWN_FIGURES:
        assert len(figure.code.splitlines()) in (5, 6)
        assert ("plt.grid" in figure.code) == figure.grid
        answers = figure.answers
        code_kind = {"line": "plot"}.get(figure.kind, figure.kind)
        assert f"plt.{code_kind}(" in figure.code
        for question in (
            "Which colour is the data?",
            "What is the title?",
            "Which colour is the background?",
        ):
            assert f'"{answers[question]}"' in figure.code
        values = json.loads(re.search(r"(\[[\d, ]+\])", figure.code)[1])
        assert str(len(values)) == answers["How many values are shown?"]


def test_figures_differ_in_their_answers_and_cover_the_grammar() -> None:
    drawn = figures.draw_figures(2400, random.Random(0))
    assert len({tuple(figure.answers.values()) for figure in drawn}) == 2400
    for field, values in {"kind": 5, "colour": 6, "title": 10, "background": 6, "num_values": 4}.items():
        counts = Counter(getattr(figure, field) for figure in drawn)
        assert len(counts) == values
        assert min(counts.values()) > 0.8 * 2400 / values


def test_colours_survive_the_small_encoder() -> None:
    """At 96 pixels, the background fills the corner and the data's colour a visible share."""
    for figure in DRAWN_FIGURES:
        small = Image.open(io.BytesIO(figures.render_figure(figure.code))).resize(
            (96, 96), Image.Resampling.BICUBIC
        )
        pixels = np.asarray(small).astype(int)
        colour, background = (
            np.array(Image.new("RGB", (1, 1), name).getpixel((0, 0)))
            for name in (figure.colour, figure.background)
        )
        assert np.abs(pixels[-1, 0] - background).max() <= 2
        inside = pixels[22:]  # below the title, which is black
        assert (np.abs(inside - colour).max(axis=-1) < 40).mean() > 0.01


@pytest.mark.parametrize("lines", [["which"], ["would", "of"], ["value", "which", "group"], ["zoo", "moose"]])
def test_page_has_each_line_whole_and_in_its_place(lines: list[str]) -> None:
    page = np.asarray(Image.open(io.BytesIO(pages.render_page("\n".join(lines)))))
    assert page.shape == (256, 256)
    ink = page < 128
    assert not ink[[0, -1]].any() and not ink[:, [0, -1]].any()  # nothing is cut
    bands = [ink[number * 85 : (number + 1) * 85].any() for number in range(3)]
    assert bands == [number < len(lines) for number in range(3)]
    rows = np.flatnonzero(ink[:85].any(axis=1))
    assert len(rows) >= 27  # the height of "o", hence 10 pixels for the encoder of 96


def test_page_shows_its_text_and_no_other(parts: dict[str, Part]) -> None:
    images = {pages.render_page(text) for text in parts["pages"].drafts}
    assert len(images) == len(parts["pages"].drafts)


def test_photographs_are_readable_and_titled() -> None:
    found = installed_photographs()
    captions = {photograph.path.stem: photograph.caption for photograph in found}
    assert captions["chelsea"] == "Chelsea the cat."
    assert captions["phantom"] == "Shepp Logan Phantom."
    for photograph in found:
        assert photograph.caption and "\n" not in photograph.caption
        with Image.open(photograph.path) as image:
            image.load()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    texts = [document.text for document in installation_documents(LIBRARY / "asyncio")] + ["in 2024"] * 100
    train_tokenizer(texts, path, ["<bos>", "<eos>", "<picture>"])
    return Tokenizer.from_file(str(path))


def test_tokenizer_has_2048_entries_and_splits_digits(tokenizer: Tokenizer) -> None:
    assert tokenizer.get_vocab_size() == 2048
    assert [tokenizer.token_to_id(token) for token in ("<bos>", "<eos>", "<picture>")] == [0, 1, 2]
    assert tokenizer.encode("2024").tokens == ["2", "0", "2", "4"]
    assert len(tokenizer.encode("asyncio").ids) <= 2  # merges were learnt


@given(text=st.text(max_size=40))
@settings(max_examples=200, deadline=None)
def test_tokenizer_gives_every_text_back(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text
