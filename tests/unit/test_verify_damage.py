"""Damaged shards, one damage each: `data_tools.verify` finds all of them, `data_tools.index` refuses them."""

import io
import pickle
import re
import shutil
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from data_tools.command import text_rule
from data_tools.verify import folder_problems
from megatron_vl.config.data import DataConfig, SourceConfig
from megatron_vl.config.errors import UserError
from megatron_vl.data.indexing import build_index
from tests.support.tiny_data import BOS, EOS, IMAGE, Samples, picture, write_source, write_tokenizer

MAX_SAMPLE_BYTES = 100_000
NUM_SHARDS, PER_SHARD = 3, 4
Members = list[tuple[tarfile.TarInfo, bytes]]


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three shards of equal size, of four samples with an image each: k0 to k11."""
    root = tmp_path_factory.mktemp("damage") / "data"
    samples: Samples = {
        f"k{i}": ({"text": f"<image>number {i % 10}"}, {"0.jpg": picture(60, 40, seed=i, file_format="JPEG")})
        for i in range(NUM_SHARDS * PER_SHARD)
    }
    write_source(root / "mixed", samples, max_samples=PER_SHARD)
    write_tokenizer(root / "tokenizer.json")
    build_index(root / "mixed", text_rule(config_for(root)), max_sample_bytes=MAX_SAMPLE_BYTES)
    sizes = {shard.stat().st_size for shard in (root / "mixed").glob("*.tar")}
    assert len(sizes) == 1, "a swap must not show in the sizes"
    return root


@pytest.fixture
def folder(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "data")) / "mixed"


def config_for(root: Path) -> DataConfig:
    return DataConfig(
        name="mine",
        root=str(root),
        sources={"mixed": SourceConfig(path=str(root / "mixed"), modality="multimodal")},
        tokenizer=f"{root}/tokenizer.json",
        bos_token=BOS,
        eos_token=EOS,
        image_token=IMAGE,
        max_sample_bytes=MAX_SAMPLE_BYTES,
        max_image_pixels=10_000,
    )


def problems_of(folder: Path) -> list[str]:
    return list(folder_problems("mixed", folder, config_for(folder.parent)))


def indexing_error(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        build_index(folder, text_rule(config_for(folder.parent)), max_sample_bytes=MAX_SAMPLE_BYTES)
    return str(caught.value)


def shard_at(folder: Path, number: int) -> Path:
    return folder / f"shard-{number:06d}.tar"


def offset_of(shard: Path, name: str) -> int:
    """Where a member's header is."""
    with tarfile.open(shard) as tar:
        return tar.getmember(name).offset


def overwrite(shard: Path, offset: int, data: bytes) -> None:
    with shard.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def repack(shard: Path, change: Callable[[Members], None]) -> None:
    """The shard with its members changed; its size may change too."""
    with tarfile.open(shard) as tar:
        members = [(info, tar.extractfile(info).read()) for info in tar]  # type: ignore[union-attr]
    change(members)
    with tarfile.open(shard, "w") as tar:
        for info, data in members:
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def added(name: str, data: bytes) -> Callable[[Members], None]:
    return lambda members: members.append((tarfile.TarInfo(name), data))


def test_whole_shards_have_no_problems(folder: Path) -> None:
    assert problems_of(folder) == []


def test_every_damage_is_found_in_one_pass_over_the_folder(folder: Path) -> None:
    """One shard truncated at 60 %, one with a bad image, one missing."""
    first, second, third = (shard_at(folder, number) for number in range(NUM_SHARDS))
    overwrite(second, offset_of(second, "k6.0.jpg") + 512, b"\0" * 8)
    third.unlink()
    whole = first.read_bytes()
    first.write_bytes(whole[: len(whole) * 6 // 10])
    problems = "\n".join(problems_of(folder))
    for shard, said in ((first, "truncated"), (second, "cannot be decoded"), (third, "missing")):
        assert any(f"{shard}" in line and said in line for line in problems.splitlines()), said


def test_a_truncated_shard_is_told_with_the_first_lost_sample(folder: Path) -> None:
    shard = shard_at(folder, 1)
    whole = shard.read_bytes()
    size = len(whole) * 6 // 10
    keys = ["k4", "k5", "k6", "k7"]
    ends = [offset_of(shard, f"{key}.0.jpg") for key in keys[1:]]
    lost = [key for key, end in zip(keys, [*ends, len(whole)], strict=True) if end > size]
    begin = offset_of(shard, f"{lost[0]}.0.jpg") + 512
    shard.write_bytes(whole[:size])
    differs, truncated = problems_of(folder)
    assert f"{shard} differs from its index: it has {size} bytes" in differs
    assert f"shard {shard}" in truncated and "truncated" in truncated
    assert truncated.endswith(f"lost: {lost[0]!r} at byte {begin}, and {len(lost) - 1} after it")
    assert str(shard) in indexing_error(folder)


def test_a_garbage_header_in_the_middle_is_told_with_key_and_byte(folder: Path) -> None:
    shard = shard_at(folder, 1)
    offset = offset_of(shard, "k6.0.jpg")
    overwrite(shard, offset, b"\xaa" * 512)
    differs, garbage = problems_of(folder)
    assert "sha256" in differs
    assert f"{shard} is damaged at byte {offset}" in garbage
    assert garbage.endswith(f"lost: 'k6' at byte {offset + 512}, and 1 after it")
    assert f"{shard} is damaged at byte {offset}" in indexing_error(folder)


def test_each_bad_image_is_told_with_key_and_byte(folder: Path) -> None:
    places = {}
    for key, number in (("k1", 0), ("k2", 0), ("k9", 2)):
        shard = shard_at(folder, number)
        places[key] = offset_of(shard, f"{key}.0.jpg") + 512
        overwrite(shard, places[key], b"no JPEG at all")
    lines = [line for line in problems_of(folder) if "sha256" not in line]
    assert len(lines) == len(places)
    for line, (key, offset) in zip(lines, places.items(), strict=True):
        assert f"sample {key!r} in {folder}" in line and f"image 0 at byte {offset} cannot be decoded" in line


def test_swapped_shards_of_equal_size_are_told_with_their_true_names(folder: Path) -> None:
    shards = [shard_at(folder, number) for number in range(2)]
    contents = [shard.read_bytes() for shard in shards]
    for shard, content in zip(shards, reversed(contents), strict=True):
        shard.write_bytes(content)
    lines = problems_of(folder)
    for shard, other, key, found in (
        (shards[0], shards[1], "k0", "k4"),
        (shards[1], shards[0], "k4", "k0"),
    ):
        (differs, stands) = (line for line in lines if f"shard {shard}" in line)
        assert "sha256" in differs and differs.endswith(f"those of {other.name}")
        assert f"sample {found!r}" in stands and f"the index has {key!r}" in stands


def test_a_shard_too_many_is_told(folder: Path) -> None:
    shutil.copy(shard_at(folder, 0), folder / "extra.tar")
    (line,) = problems_of(folder)
    assert "extra.tar is not in its index.json" in line


class Exploit:
    """What an unpickler would call."""

    def __reduce__(self) -> tuple[Callable[..., None], tuple[str]]:
        return Path.touch, (Path("unpickled"),)  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (added("k7.pkl", pickle.dumps(Exploit())), r"sample 'k7' in .*: unexpected file: pkl"),
        (added("bad.pkl", b"x"), r"sample 'bad' in .*: no JSON"),
        (added("../out.json", b'{"text": "x"}'), r"'\.\./out\.json' at byte \d+ leads out of the folder"),
        (added("a/../../b.json", b'{"text": "x"}'), r"'a/\.\./\.\./b\.json' at byte \d+ leads out"),
        (added("/etc/b.json", b'{"text": "x"}'), r"'/etc/b\.json' at byte \d+ leads out"),
        (added("k4.json", b'{"text": "x"}'), r"sample 'k4' in .*: duplicate key: .* at byte \d+"),
        (added("new.json", b"{"), r"sample 'new' in .*: invalid JSON"),
    ],
)
def test_a_member_that_does_not_belong_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Members], None], said: str
) -> None:
    monkeypatch.chdir(folder.parent)
    shard = shard_at(folder, 1)
    repack(shard, change)
    differs, *lines = problems_of(folder)
    assert f"{shard} differs from its index" in differs
    (line,) = (line for line in lines if re.search(said, line))
    assert str(shard) in line and re.search(r"byte \d+", line)
    assert re.search(said, indexing_error(folder))
    assert not Path("unpickled").exists()


def test_a_member_that_declares_ten_gigabytes_is_refused_before_it_is_read(folder: Path) -> None:
    shard = shard_at(folder, 1)
    offset = offset_of(shard, "k6.0.jpg")
    with tarfile.open(shard) as tar:
        info = tar.getmember("k6.0.jpg")
    info.size = 10 << 30
    overwrite(shard, offset, info.tobuf(tarfile.GNU_FORMAT))
    said = f"'k6.0.jpg' at byte {offset} declares {10 << 30} bytes, but the shard ends at byte"
    assert sum(said in line for line in problems_of(folder)) == 1
    assert said in indexing_error(folder)


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME])
def test_an_extended_header_of_ten_gigabytes_is_refused_before_it_is_read(folder: Path, kind: bytes) -> None:
    """tarfile itself would ask for that much memory."""
    shard = shard_at(folder, 1)
    info = tarfile.TarInfo("long")
    info.type, info.size = kind, 10 << 30
    overwrite(shard, 0, info.tobuf(tarfile.GNU_FORMAT))
    said = f"a header of {10 << 30} bytes"
    assert sum(said in line for line in problems_of(folder)) == 1
    assert said in indexing_error(folder)


def test_an_image_whose_header_says_too_many_pixels_is_not_decoded(folder: Path) -> None:
    shard = shard_at(folder, 0)
    offset = offset_of(shard, "k2.0.jpg") + 512
    frame = shard.read_bytes().index(b"\xff\xc0", offset)
    overwrite(shard, frame + 5, struct.pack(">HH", 60_000, 60_000))
    (line,) = (line for line in problems_of(folder) if "sha256" not in line)
    assert f"image 0 at byte {offset} says 60000 x 60000 pixels; data.max_image_pixels is 10000" in line
    assert "'k2'" in line
