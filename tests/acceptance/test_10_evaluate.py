"""A checkpoint is measured and talked to: during training, alone at another parallel setting, and in the terminal."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from megatron_vl.checkpoint.convert.exporting import export_model
from megatron_vl.checkpoint.convert.importing import import_model
from tests.support.releases import KINDS, release
from tests.support.runs import command, finish
from tests.support.tiny_data import picture

BENCHMARK = "evaluation.benchmarks"
MAX_NEW_TOKENS = 20


def write_benchmarks(folder: Path) -> list[str]:
    """HellaSwag by choice, POPE by generation about images, and a text; the overrides that name them."""
    endings = ["a red bar", "a blue line", "words", "it"]
    rows = [
        {
            "ind": n,
            "ctx": f"the picture {n} shows",
            "endings": endings,
            "label": n % 4,
            "activity_label": "bars",
        }
        for n in range(6)
    ]
    (folder / "hellaswag.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    (folder / "images").mkdir()
    questions = []
    for n in range(4):
        (folder / "images" / f"{n}.png").write_bytes(picture(60, 40 + n, seed=n))
        answer = {
            "question_id": n,
            "image": f"{n}.png",
            "text": "Is there a bar?",
            "label": ["yes", "no"][n % 2],
        }
        questions.append(json.dumps(answer))
    (folder / "coco_pope_random.json").write_text("\n".join(questions))
    (folder / "text.txt").write_text("the picture shows a red bar and a blue line with words in it. " * 9)
    return [
        f"+{BENCHMARK}.hellaswag.path={folder / 'hellaswag.jsonl'}",
        f"+{BENCHMARK}.pope.path={folder / 'coco_pope_random.json'}",
        f"+{BENCHMARK}.pope.images={folder / 'images'}",
        f"+{BENCHMARK}.pope.max_new_tokens=4",
        f"+{BENCHMARK}.words.path={folder / 'text.txt'}",
        f"+{BENCHMARK}.words.format=text",
    ]


def evaluate(*overrides: str) -> tuple[int, str]:
    words = command(Path(), Path())[:2]
    return finish([*words, "launch.evaluate", "precision=fp32", *overrides])


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_during_training_and_alone_it_measures_the_same(data_root: Path, tmp_path: Path) -> None:
    """The hook under PP2 in the middle of training against `launch.evaluate` at TP2, which loads the checkpoint."""
    benchmarks = write_benchmarks(tmp_path)
    run = tmp_path / "run"
    training = [
        "stages=[sft]",
        "train.steps=4",
        "evaluation.every=2",
        "parallel.pipeline_size=2",
        *benchmarks,
    ]
    status, output = finish(command(data_root, run, *training))
    assert status == 0, output
    rows = read_lines(run / "benchmarks.jsonl")
    assert {row["step"] for row in rows} == {2, 4}
    during = {(row["benchmark"], row["metric"]): row["value"] for row in rows if row["step"] == 4}
    samples = json.loads((run / "samples.json").read_text())
    assert {sample["source"] for sample in samples} == {"chat_pages", "chat_figures"}
    assert all(isinstance(sample["answer"], str) for sample in samples)
    checkpoint = run / "checkpoints" / "sft-00000004"
    alone = [
        f"checkpoint={checkpoint}",
        f"run.dir={tmp_path / 'evaluate'}",
        "parallel.tensor_size=2",
        *benchmarks,
    ]
    status, output = evaluate(*alone)
    assert status == 0, output
    results = json.loads((tmp_path / "evaluate" / "results.json").read_text())["benchmarks"]
    after = {
        (name, metric): value
        for name, result in results.items()
        for metric, value in result["metrics"].items()
    }
    assert after == pytest.approx(during, rel=1e-5)
    assert {name: result["method"] for name, result in results.items()} == {
        "hellaswag": "choice",
        "pope": "generate",
        "words": "bits_per_byte",
    }
    answers = read_lines(tmp_path / "evaluate" / "answers" / "hellaswag.jsonl")
    assert [len(answer["option_scores"]) for answer in answers] == [4] * 6
    assert "bits_per_byte" in output and "accuracy" in output


@pytest.fixture(scope="module", params=KINDS)
def imported(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path, Path]:
    """A checkpoint of random weights, its export for transformers, and an image."""
    folder = tmp_path_factory.mktemp(request.param)
    release(folder / "source", request.param)
    import_model(folder / "source", folder / "checkpoint")
    export_model(folder / "checkpoint", folder / "export")
    (folder / "image.png").write_bytes(picture(64, 48, seed=5))
    return folder / "checkpoint", folder / "export", folder / "image.png"


def transformers_answer(folder: Path, image: Path, question: str) -> str:
    """Greedy, by `generate`, with the export's own processor and chat template."""
    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    content = [{"type": "image", "image": Image.open(image)}, {"type": "text", "text": question}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    tokens = model.generate(**inputs, do_sample=False, max_new_tokens=MAX_NEW_TOKENS)
    return str(processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)).strip()


def test_an_answer_is_transformers_answer(imported: tuple[Path, Path, Path], tmp_path: Path) -> None:
    checkpoint, export, image = imported
    asked = [f"checkpoint={checkpoint}", "mode=chat", "chat.prompt=what is it?", f"chat.images=[{image}]"]
    status, output = evaluate(*asked, f"chat.max_new_tokens={MAX_NEW_TOKENS}", "data.image_rounding=round")
    expected = transformers_answer(export, image, "what is it?")
    assert len(set(expected)) > 3
    assert (status, output.strip()) == (0, expected)
