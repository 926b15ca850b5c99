"""Benchmarks as a configuration names them: refused by field before ranks start, by item before training does."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_vl.config.errors import UserError
from megatron_vl.config.evaluate import EvaluationConfig
from megatron_vl.data.loader import ContentRule
from megatron_vl.evaluate.suite import check_items, load_suite
from megatron_vl.evaluate.suite_check import check_suite
from tests.support.evaluation import content_rule
from tests.support.tiny_data import picture, write_tokenizer


@pytest.fixture(name="pope")
def write_pope(tmp_path: Path) -> dict[str, Any]:
    """Two questions; the second one is about page.png, which is no image."""
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "0.png").write_bytes(picture())
    (tmp_path / "images" / "page.png").write_bytes(b"<html>")
    rows = [
        {"question_id": n, "image": image, "text": "Is there a bar?", "label": "yes"}
        for n, image in enumerate(("0.png", "page.png"))
    ]
    (tmp_path / "pope.json").write_text("\n".join(json.dumps(row) for row in rows))
    return {"path": str(tmp_path / "pope.json"), "images": str(tmp_path / "images")}


@pytest.fixture(scope="module", name="content")
def make_content(tmp_path_factory: pytest.TempPathFactory) -> ContentRule:
    return content_rule(write_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"), 32, 4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pth": "x"}, r"benchmarks\.pope\.pth: there is no such field; valid: format, path,"),
        ({"max_items": "few"}, r"benchmarks\.pope=.*'few'"),
        ({"max_items": 0}, r"benchmarks\.pope\.max_items=0: must be at least 1"),
        ({"format": "popes"}, r"benchmarks\.pope\.format=popes: must be one of mmbench"),
        ({"path": "/nowhere"}, r"benchmarks\.pope\.path=/nowhere does not exist"),
        ({"images": "/nowhere"}, r"benchmarks\.pope\.images=/nowhere is not a folder"),
        ({"method": "guess"}, r"benchmarks\.pope\.method=guess: must be choice or generate"),
        ({"normalization": "words"}, r"benchmarks\.pope\.normalization=words: must be one of none"),
    ],
)
def test_a_wrong_field_is_named(changes: dict[str, Any], message: str, pope: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=message):
        check_suite(EvaluationConfig(benchmarks={"pope": pope | changes}))


def test_a_benchmark_has_fields() -> None:
    with pytest.raises(UserError, match=r"benchmarks\.pope=pope\.json: must be fields, of format, path"):
        check_suite(EvaluationConfig(benchmarks={"pope": "pope.json"}))


@pytest.mark.parametrize(
    ("field", "value"), [("every", -1), ("sequence_length", 0), ("max_cached_positions", 0)]
)
def test_a_limit_has_a_least_value(field: str, value: int) -> None:
    with pytest.raises(UserError, match=rf"evaluation\.{field}={value}: must be at least"):
        check_suite(EvaluationConfig(**{field: value}))


@pytest.mark.parametrize("method", ["generate", "choice"])
def test_bad_items_are_told_before_anything_runs(
    method: str, pope: dict[str, Any], content: ContentRule
) -> None:
    def check(sequence_length: int, **changes: Any) -> None:
        suite = check_suite(EvaluationConfig(benchmarks={"pope": pope | {"method": method} | changes}))
        check_items(load_suite(suite, execute_code=False), content, sequence_length)

    check(2048, max_items=1)
    with pytest.raises(
        UserError, match=r"benchmarks\.pope: item 'pope/1': its image .*page\.png cannot be decoded"
    ):
        check(2048)
    with pytest.raises(
        UserError, match=r"benchmarks\.pope: item 'pope/0'.* takes [0-9]+ positions; .*leave 16"
    ):
        check(16, max_items=1)
