"""Files of conversations become shards: every record once, whole folders or none, nothing left out in silence."""

import json
import tarfile
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from data_tools import builder, part_writer
from data_tools.builder import build
from data_tools.raw import recipe
from data_tools.raw.recipe import raw_recipe
from data_tools.recipe import Record
from data_tools.verify import folder_problems
from data_tools.workers import worker_pool
from megatron_vl.config.data import DataConfig
from megatron_vl.config.errors import UserError
from tests.support.conversations import ANSWER, config_for, write_raw
from tests.support.tiny_data import picture

NUM_RECORDS = 60


class Pool:
    """Renders in this process; `largest` is how many drafts were ever asked for at once."""

    largest = 0

    def map(self, function: Callable[..., Any], drafts: Sequence[Any], chunksize: int) -> Iterable[Any]:
        self.largest = max(self.largest, len(drafts))
        return map(function, drafts)


@pytest.fixture(autouse=True)
def pool(monkeypatch: pytest.MonkeyPatch) -> Pool:
    pool = Pool()
    monkeypatch.setattr(builder, "worker_pool", lambda num_processes: nullcontext(pool))
    return pool


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("raw")
    write_raw(folder, NUM_RECORDS)
    return folder


def run(config: DataConfig, num_processes: int = 1) -> list[str]:
    """Build; what was told."""
    told: list[str] = []
    build(raw_recipe(config), config, num_processes=num_processes, report=told.append)
    return told


def samples(folder: Path) -> dict[str, tuple[dict[str, Any], list[bytes]]]:
    """Fields and images by key."""
    members: dict[str, dict[str, bytes]] = {}
    for shard in sorted(folder.glob("*.tar")):
        with tarfile.open(shard) as tar:
            for member in tar:
                key, _, name = member.name.partition(".")
                members.setdefault(key, {})[name] = tar.extractfile(member).read()
    return {
        key: (json.loads(files.pop("json")), [files[name] for name in sorted(files)])
        for key, files in members.items()
    }


def with_records(folder: Path, raw: Path, changed: dict[int, Any]) -> Path:
    """A copy of the raw file with other records at some places; beside the same images."""
    folder.mkdir(exist_ok=True)
    records = json.loads((raw / "records.json").read_text())
    for number, record in changed.items():
        records[number] = record
    (folder / "records.json").write_text(json.dumps(records))
    return folder / "records.json"


def files(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_every_record_is_a_sample_with_its_images(raw: Path, tmp_path: Path, pool: Pool) -> None:
    config = config_for(tmp_path / "data", raw)
    run(config)
    training, heldout = samples(tmp_path / "data/chat"), samples(tmp_path / "data/heldout/chat")
    records = json.loads((raw / "records.json").read_text())
    assert {int(key.removeprefix("chat-")) for key in training | heldout} == set(range(NUM_RECORDS))
    assert not training.keys() & heldout.keys()
    assert 0.05 * NUM_RECORDS < len(heldout) < 0.4 * NUM_RECORDS
    for key, (fields, images) in (training | heldout).items():
        record = records[int(key.removeprefix("chat-"))]
        contents = [turn["value"] for turn in record["conversations"]]
        assert [message["content"] for message in fields["messages"]] == contents
        names = record.get("image", [])
        names = names if isinstance(names, list) else [names]
        assert images == [(raw / "images" / name).read_bytes() for name in names]
    assert pool.largest < NUM_RECORDS  # not all are rendered before any is written
    for name, folder in (("chat", "chat"), ("heldout/chat", "heldout/chat")):
        assert list(folder_problems(name, tmp_path / "data" / folder, config)) == []


def test_records_of_an_image_are_held_out_together(raw: Path, tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "What?"}, ANSWER]
    file = tmp_path / "records.jsonl"
    records = [
        {"image": f"{n % 5}.{'png' if n % 2 else 'jpg'}", "conversations": turns} for n in range(5)
    ] * 6
    file.write_text("\n".join(map(json.dumps, records)))
    run(config_for(tmp_path / "data", raw, file=str(file), heldout_fraction=0.4))
    numbers = [
        {int(key[-6:]) % 5 for key in samples(tmp_path / "data" / folder)}
        for folder in ("chat", "heldout/chat")
    ]
    assert not numbers[0] & numbers[1]
    assert numbers[0] | numbers[1] == set(range(5))


def test_interrupted_and_with_other_processes_it_is_the_same(
    raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(config_for(tmp_path / "a" / "data", raw))
    write = part_writer.FolderWriter.write

    def stop(writer: part_writer.FolderWriter, number: int, record: Record) -> bool:
        if number == 40:
            raise KeyboardInterrupt
        return write(writer, number, record)

    config = config_for(tmp_path / "b" / "data", raw)
    with monkeypatch.context() as patch:
        patch.setattr(part_writer.FolderWriter, "write", stop)
        with pytest.raises(KeyboardInterrupt):
            run(config)
    assert not (tmp_path / "b" / "data").exists()
    assert not (tmp_path / "b" / "data.unfinished" / "chat").exists()
    monkeypatch.setattr(builder, "worker_pool", worker_pool)
    assert any("interrupted" in message for message in run(config, num_processes=2))
    found, expected = files(tmp_path / "b" / "data"), files(tmp_path / "a" / "data")
    assert found.keys() == expected.keys()
    assert found == expected


def test_a_changed_record_or_value_builds_anew(raw: Path, tmp_path: Path) -> None:
    file = with_records(tmp_path / "raw", raw, {})
    values = {"file": str(file), "images": f"{raw}/images"}
    config = config_for(tmp_path / "data", raw, **values)
    run(config)
    assert "is complete" in run(config)[0]
    with_records(tmp_path / "raw", raw, {0: {"conversations": [{"from": "human", "value": "New?"}, ANSWER]}})
    assert "building anew" in run(config)[0]
    changed = config_for(tmp_path / "data", raw, **values, system="Be brief.")
    assert "building anew" in run(changed)[0]
    messages = [fields["messages"] for fields, _ in samples(tmp_path / "data/chat").values()]
    assert all(message[0] == {"role": "system", "content": "Be brief."} for message in messages)


def asking(*images: str, **more: Any) -> dict[str, Any]:
    return {"image": list(images), "conversations": [{"from": "human", "value": "What?"}, ANSWER], **more}


BAD_RECORDS = [
    (asking("nowhere.jpg", id="r7"), "missing image", r"record 7 \(id 'r7'\) of .*nowhere\.jpg"),
    (asking("."), "missing image", "directory"),
    (asking("garbage.jpg"), "image cannot be decoded", r"garbage\.jpg"),
    (asking("cut.png"), "image cannot be decoded", r"cut\.png.*truncated"),
    (asking("large.png"), "image beyond the pixel limit", "2000 x 10 pixels; data.max_image_pixels is 10000"),
    (asking("0.jpg", "heavy.png"), "sample too large", r"heavy\.png has .*data.max_sample_bytes leaves"),
    ({"conversations": [{"from": "human", "value": " "}, ANSWER]}, "invalid sample", "message 0"),
    ({"conversations": [ANSWER]}, "roles do not alternate", r"\['assistant'\]"),
]


@pytest.fixture(scope="module")
def odd_images(raw: Path) -> None:
    (raw / "images/garbage.jpg").write_bytes(b"no image")
    (raw / "images/cut.png").write_bytes(picture(100, 100)[:9000])
    (raw / "images/large.png").write_bytes(picture(2000, 10))
    (raw / "images/heavy.png").write_bytes(picture(99, 101) + bytes(500_000))


@pytest.mark.usefixtures("odd_images")
@pytest.mark.parametrize(("record", "cause", "detail"), BAD_RECORDS)
def test_a_record_that_cannot_be_used_is_told_and_listed(
    raw: Path, tmp_path: Path, record: Any, cause: str, detail: str
) -> None:
    file = with_records(tmp_path / "raw", raw, {7: record})
    values = {"file": str(file), "images": f"{raw}/images"}
    config = config_for(tmp_path / "data", raw, **values, max_rejected_fraction=0.02)
    config.max_image_pixels, config.max_sample_bytes = 10_000, 100_000
    (told,) = run(config)
    assert told.startswith(
        f"chat, heldout/chat: 1 of 60 records cannot be used: 1 x {cause}, such as record 7"
    )
    listed = [json.loads(line) for line in (tmp_path / "data/chat/rejected.jsonl").read_text().splitlines()]
    assert [rejection["cause"] for rejection in listed] == [cause]
    built = samples(tmp_path / "data/chat") | samples(tmp_path / "data/heldout/chat")
    assert len(built) == NUM_RECORDS - 1
    assert "chat-000007" not in built

    strict = config_for(tmp_path / "strict", raw, **values)
    strict.max_image_pixels, strict.max_sample_bytes = 10_000, 100_000
    with pytest.raises(UserError, match=rf"{cause}.*{detail}.*more than max_rejected_fraction=0\.01 allows"):
        run(strict)
    assert not (tmp_path / "strict").exists()
    assert not (tmp_path / "strict.unfinished" / "chat").exists()


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        (
            {"format": "parquet"},
            r"data\.sources\.chat\.raw\.format is 'parquet'; valid: conversations, captions, interleaved, text",
        ),
        ({"file": "/nowhere/a.json"}, r"raw\.file is /nowhere/a\.json"),
        ({"images": "/nowhere"}, r"raw\.images is /nowhere, which is no folder"),
        ({"heldout_fraction": 1.0}, r"raw\.heldout_fraction=1\.0 must be at least 0 and below 1"),
        ({"max_rejected_fraction": -0.1}, r"raw\.max_rejected_fraction=-0\.1 must"),
        ({"heldout_fraction": 1e-9}, "heldout/chat: none of the 60 records"),
    ],
)
def test_values_are_checked(raw: Path, tmp_path: Path, values: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        run(config_for(tmp_path / "data", raw, **values))
    assert not (tmp_path / "data").exists()


def test_a_file_that_was_cut_off_builds_nothing(raw: Path, tmp_path: Path) -> None:
    file = with_records(tmp_path / "raw", raw, {})
    file.write_bytes(file.read_bytes()[:-30])
    with pytest.raises(UserError, match=rf"data\.sources\.chat\.raw\.file is {file}: record 59, .* cut off"):
        run(config_for(tmp_path / "data", raw, file=str(file)))
    assert not (tmp_path / "data").exists()


def test_a_tokenizer_in_the_root_is_trained(raw: Path, tmp_path: Path) -> None:
    config = config_for(tmp_path / "data", raw)
    config.tokenizer = f"{config.root}/tokenizer.json"
    run(config)
    tokenizer = Tokenizer.from_file(config.tokenizer)
    assert tokenizer.decode(tokenizer.encode("红色 bars").ids) == "红色 bars"
    assert list(folder_problems("chat", tmp_path / "data/chat", config)) == []


def test_at_most_so_many_records(raw: Path, tmp_path: Path) -> None:
    """Drawn from all of the file, in its order, and the same ones every time."""
    config = config_for(tmp_path / "data", raw)
    config.sources["chat"].raw.limit = 20
    run(config)
    kept = samples(tmp_path / "data/chat") | samples(tmp_path / "data/heldout/chat")
    questions = {json.dumps(fields["messages"]) for fields, _ in kept.values()}
    run(config_for(tmp_path / "all", raw))
    everything = samples(tmp_path / "all/chat") | samples(tmp_path / "all/heldout/chat")
    numbers = [
        int(key.removeprefix("chat-"))
        for key, (fields, _) in everything.items()
        if json.dumps(fields["messages"]) in questions
    ]
    assert len(kept) == 20
    assert max(numbers) - min(numbers) > 30


def test_folders_must_fit(raw: Path, tmp_path: Path) -> None:
    elsewhere = config_for(tmp_path / "data", raw)
    elsewhere.root = f"{tmp_path}/other"
    with pytest.raises(UserError, match=r"data\.sources\.chat is built in .*data\.root"):
        run(elsewhere)
    unheld = config_for(tmp_path / "data", raw)
    unheld.sources["chat"].heldout = None
    with pytest.raises(UserError, match=r"heldout_fraction=0\.2, but data\.sources\.chat\.heldout=None"):
        run(unheld)


def test_images_have_no_place_in_a_text_source(raw: Path, tmp_path: Path) -> None:
    config = config_for(tmp_path / "data", raw)
    config.sources["chat"].modality = "text"
    with pytest.raises(UserError, match=r"1 x image in a text source.*modality must be multimodal"):
        run(config)


def test_the_version_knows_the_code(raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_for(tmp_path / "data", raw)
    before = raw_recipe(config).version
    monkeypatch.setattr(recipe, "__file__", str(tmp_path / "recipe.py"))
    (tmp_path / "recipe.py").write_text("changed")
    assert raw_recipe(config).version != before
