"""Weights in files of other projects: safetensors or `torch.save`, one file or several with an index.

Nothing is unpickled: `.bin`, `.pt` and `.pth` files are read with torch's `weights_only`. Files are mapped into
memory, so that only the tensors in hand take room.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megatron_vl.config.errors import UserError

# In order of preference; the first that a folder has is read.
SINGLE_FILES = ("model.safetensors", "pytorch_model.bin")
INDEX_SUFFIX = ".index.json"
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
MAX_JSON_BYTES = 50_000_000
READABLE = 0o644
MAX_FILE_BYTES = 4_000_000_000  # of a file that is written


@dataclass(frozen=True)
class TensorInfo:
    shape: torch.Size
    dtype: torch.dtype


class WeightFiles:
    """The tensors of a folder or of a single file, by name.

    Raises:
        UserError: there are no weights, a file is missing, cut short or not what it says it is.
    """

    def __init__(self, source: Path) -> None:
        self.source = source
        files = {path.name: _open(path) for path in _find_files(source)}
        self._files: dict[str, _File] = {}
        for name, file in files.items():
            for tensor in file.names():
                if tensor in self._files:
                    raise UserError(f"{source}: {tensor} is in {name} and in another file")
                self._files[tensor] = file

    def names(self) -> list[str]:
        return sorted(self._files)

    def info(self, name: str) -> TensorInfo:
        """Shape and dtype, without reading values."""
        return self._files[name].info(name)

    def read(self, name: str) -> Tensor:
        return self._files[name].read(name)


class _File:
    """One file of named tensors."""

    def names(self) -> list[str]:
        raise NotImplementedError

    def info(self, name: str) -> TensorInfo:
        raise NotImplementedError

    def read(self, name: str) -> Tensor:
        raise NotImplementedError


class _Safetensors(_File):
    """Mapped anew for each tensor, so that the pages of those before it are given back."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with self._open() as file:
            parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  (it is no mapping)
            self._infos = {name: (part.get_shape(), part.get_dtype()) for name, part in parts.items()}

    def names(self) -> list[str]:
        return list(self._infos)

    def info(self, name: str) -> TensorInfo:
        shape, dtype = self._infos[name]
        if dtype not in DTYPES:
            raise UserError(f"{self._path}: {name} has dtype {dtype}; valid: {', '.join(DTYPES)}")
        return TensorInfo(torch.Size(shape), DTYPES[dtype])

    def read(self, name: str) -> Tensor:
        with self._open() as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor

    def _open(self) -> Any:
        return safe_open(self._path, framework="pt")


class _TorchSaved(_File):
    def __init__(self, path: Path) -> None:
        self._tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        if not isinstance(self._tensors, dict) or not all(
            isinstance(value, Tensor) for value in self._tensors.values()
        ):
            raise UserError(f"{path} holds no table of tensors by name")

    def names(self) -> list[str]:
        return list(self._tensors)

    def info(self, name: str) -> TensorInfo:
        tensor = self._tensors[name]
        return TensorInfo(tensor.shape, tensor.dtype)

    def read(self, name: str) -> Tensor:
        tensor: Tensor = self._tensors[name]
        return tensor


def _open(path: Path) -> _File:
    try:
        return _Safetensors(path) if path.suffix == ".safetensors" else _TorchSaved(path)
    except UserError:
        raise
    except SafetensorError as error:
        raise UserError(f"{path} is no whole safetensors file ({error}); fetch it again") from error
    except Exception as error:  # torch.load raises many kinds; weights_only refuses code with UnpicklingError
        raise UserError(
            f"{path} cannot be read as tensors alone ({_first_line(error)}); save it as safetensors"
        ) from error


def _find_files(source: Path) -> list[Path]:
    if source.is_file():
        return [source]
    if not source.is_dir():
        raise UserError(f"{source} does not exist; give a folder of weights or a file")
    for name in SINGLE_FILES:
        if (source / name).is_file():
            return [source / name]
        if (source / f"{name}{INDEX_SUFFIX}").is_file():
            return _indexed_files(source / f"{name}{INDEX_SUFFIX}")
    raise UserError(
        f"{source} has no weights: it must hold one of {', '.join(SINGLE_FILES)}, or such files in pieces and "
        f"their {SINGLE_FILES[0]}{INDEX_SUFFIX}"
    )


def _indexed_files(index: Path) -> list[Path]:
    files = read_json(index).get("weight_map")
    if not isinstance(files, dict) or not files or not all(isinstance(name, str) for name in files.values()):
        raise UserError(f'{index} has no "weight_map" from tensor names to file names')
    paths = [index.parent / name for name in sorted(set(files.values()))]
    for path in paths:
        if path.parent != index.parent or not path.is_file():
            raise UserError(f"{index} names {path.name}, which is not beside it")
    return paths


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises UserError where it is missing, too large or no object."""
    try:
        size = path.stat().st_size
        if size > MAX_JSON_BYTES:
            raise UserError(f"{path} has {size} bytes, more than the {MAX_JSON_BYTES} that are read")
        values = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # nested more deeply than Python reads
        raise UserError(f"{path} is no JSON ({error})") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} holds a {type(values).__name__}; it must hold an object")
    return values


def read_json_if_there(path: Path) -> dict[str, Any]:
    """`read_json`, or nothing where there is no such file."""
    return read_json(path) if path.is_file() else {}


def write_safetensors(folder: Path, tensors: Iterator[tuple[str, Tensor]], sizes: Mapping[str, int]) -> None:
    """Write `model.safetensors`, or pieces of at most MAX_FILE_BYTES and their index.

    `sizes` are bytes by name, in the order in which `tensors` come; one piece is in memory at a time.
    """
    pieces = _pieces(sizes)
    names = (
        [SINGLE_FILES[0]]
        if len(pieces) == 1
        else [f"model-{number:05d}-of-{len(pieces):05d}.safetensors" for number in range(1, len(pieces) + 1)]
    )
    weight_map: dict[str, str] = {}
    for file, piece in zip(names, pieces, strict=True):
        _write_piece(folder / file, islice(tensors, len(piece)))
        weight_map |= dict.fromkeys(piece, file)
    if len(pieces) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        (folder / f"{SINGLE_FILES[0]}{INDEX_SUFFIX}").write_text(json.dumps(index, indent=2) + "\n")


def _write_piece(path: Path, tensors: Iterator[tuple[str, Tensor]]) -> None:
    # Views of one tensor (q, k, v of a fused weight) would share their memory, which safetensors refuses.
    own = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors}
    save_file(own, path, metadata={"format": "pt"})
    path.chmod(READABLE)  # the library leaves it to its owner alone


def _pieces(sizes: Mapping[str, int]) -> list[list[str]]:
    pieces: list[list[str]] = [[]]
    room = MAX_FILE_BYTES
    for name, size in sizes.items():
        if size > room and pieces[-1]:
            pieces.append([])
            room = MAX_FILE_BYTES
        pieces[-1].append(name)
        room -= size
    return pieces


def _first_line(error: Exception) -> str:
    return re.split(r"\n|\. ", str(error).strip(), maxsplit=1)[0]
