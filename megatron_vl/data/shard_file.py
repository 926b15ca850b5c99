"""One shard while it is written: what its samples' files are, and how an interrupted writer goes on within it."""

import io
import json
import os
import re
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from webdataset.writer import TarWriter

from megatron_vl.data.sample import SampleError, order_images, parse_sample
from megatron_vl.data.tar import END_MARKER_BYTES

KEY_PATTERN = re.compile(
    r"(?=.{1,80}$)[A-Za-z0-9_-]+(/[A-Za-z0-9_-]+)*"
)  # no dot: extensions start at the first


def sample_files(
    key: str, fields: Mapping[str, Any], images: Mapping[str, bytes], where: str, max_bytes: int
) -> dict[str, bytes]:
    """The files of a sample by extension: "json" of `fields`, and `images` ("0.jpg", "1.png", …) as they are.

    Raises SampleError, naming `where`, where the sample is not as docs/data.md describes.
    """
    if not KEY_PATTERN.fullmatch(key):
        raise SampleError(
            "invalid key", key, where, 'keys are 1 to 80 letters, digits, "-", "_", and "/" between'
        )
    data = json.dumps(dict(fields), ensure_ascii=False).encode(errors="surrogatepass")
    sample = parse_sample(data, key, where, max_bytes)
    order_images(images, sample.num_images, key, where)
    return {"json": data, **images}


class OpenShard:
    """A shard written beside its place, without an owner and a time: its samples alone decide its bytes.

    `num_bytes` and `num_samples` of an earlier `OpenShard` of this path, flushed then, continue it from there;
    what it wrote after that is cut off.
    """

    def __init__(self, path: Path, *, num_bytes: int = 0, num_samples: int = 0) -> None:
        self.path, self.aside = path, aside_path(path)
        self.num_samples, self.num_bytes = num_samples, num_bytes  # without the end marker
        self._file = self.aside.open("r+b" if num_bytes else "wb")
        self._file.truncate(num_bytes)
        self._file.seek(num_bytes)

    def add(self, key: str, files: Mapping[str, bytes]) -> None:
        """One sample's files by extension."""
        self.num_bytes += self._file.write(_tar_bytes(key, files))
        self.num_samples += 1

    def flush(self) -> None:
        """What was added so far survives the machine."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def finish(self) -> None:
        """Put the shard in its place."""
        marked = self.num_bytes + END_MARKER_BYTES
        self._file.write(bytes(marked + -marked % tarfile.RECORDSIZE - self.num_bytes))
        self.flush()
        self._file.close()
        self.aside.replace(self.path)

    def close(self) -> None:
        """Leave it unfinished."""
        self._file.close()

    def discard(self) -> None:
        """Remove it."""
        self.close()
        self.aside.unlink()


def _tar_bytes(key: str, files: Mapping[str, bytes]) -> memoryview:
    """A sample as webdataset writes it, in a tar of its own without the end: such parts make up a shard, and it can be
    continued after any of them."""
    buffer = io.BytesIO()
    writer = TarWriter(buffer, user="", group="", mtime=0, encoder=False, compress=False)
    writer.write({"__key__": key, **files})
    num_bytes = writer.tarstream.offset
    writer.close()
    return buffer.getbuffer()[:num_bytes]


def aside_path(shard: Path) -> Path:
    """Where a shard lies until it is complete."""
    return shard.with_suffix(".tar.partial")
