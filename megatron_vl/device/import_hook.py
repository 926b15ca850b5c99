"""Makes unmodified megatron-core run on hosts without CUDA, and mends it on hosts without TransformerEngine.

`megatron_vl/__init__.py` installs the hook, so every module of this package may import `megatron.core` at its
top, in any order. Installing is free and decides nothing: the host is looked at when megatron-core is first
imported. From then on

- everywhere, a module of megatron-core for which `megatron_repairs` has something is mended once it has run;
- without CUDA, it is also rewritten in memory before it runs (`source_rewrite`): what names CUDA then names
  the CPU, or `cuda_shim`. torch itself stays as it is. Patching torch.cuda instead does not work: autograd's
  threads do not see the patches, and torch.compile breaks on them.

Bytecode of rewritten modules lies beside the ordinary one under a name of its own, so runs with CUDA never see it.
"""

import importlib
import importlib.util
import marshal
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

from megatron_vl.device import source_rewrite
from megatron_vl.device.garbage import collection_paused
from megatron_vl.device.source_rewrite import SHIM_MODULE, SHIM_NAME, rewrite_for_cpu

_ROOT = "megatron.core"
_VARIANT = "cpu"  # as if it were a level of optimization: module.cpython-311.opt-cpu.pyc
_HASHED_BYTECODE = (0b01).to_bytes(
    4, "little"
)  # PEP 552: valid by its hash, which Python itself need not check


def install() -> None:
    """Install the hook, once.

    Raises:
        ImportError: megatron-core is imported already, so its modules escaped the hook.
    """
    if any(isinstance(finder, _MegatronFinder) for finder in sys.meta_path):
        return
    if _ROOT in sys.modules:
        raise ImportError(
            f"{_ROOT} was imported before megatron_vl, which has to prepare it for hosts without CUDA or "
            "TransformerEngine: import megatron_vl first"
        )
    sys.meta_path.insert(0, _MegatronFinder())


class _MegatronFinder(MetaPathFinder):
    """Finds `megatron.core` and its modules where they are, and has them loaded by our loaders."""

    def __init__(self) -> None:
        self._make_loader: Callable[[str, str], SourceFileLoader] | None = None

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _ROOT and not fullname.startswith(_ROOT + "."):
            return None
        if self._make_loader is None:
            self._make_loader = _loader_for_this_host()
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):  # not for compiled extensions
            spec.loader = self._make_loader(fullname, spec.loader.path)
        return spec


def _loader_for_this_host() -> Callable[[str, str], SourceFileLoader]:
    """Look at the host: has it CUDA, and TransformerEngine?"""
    # Imported here, as they import torch, which importing megatron_vl must not.
    import torch

    from megatron_vl.device.megatron_repairs import repairs_for_host

    cuda = torch.cuda.is_available()
    transformer_engine = cuda and importlib.util.find_spec("transformer_engine") is not None
    return partial(_RepairingLoader if cuda else _RewritingLoader, repairs_for_host(cuda, transformer_engine))


class _RepairingLoader(SourceFileLoader):
    """Loads a module and mends it."""

    def __init__(self, repairs: Mapping[str, Mapping[str, Any]], fullname: str, path: str) -> None:
        super().__init__(fullname, path)
        self._repairs = repairs.get(fullname, {})

    def exec_module(self, module: ModuleType) -> None:
        with warnings.catch_warnings():
            # Of its use of its own old parts; of fallbacks that are mended, or are this host's only choice.
            warnings.simplefilter("ignore", DeprecationWarning)
            warnings.filterwarnings("ignore", message="(Transformer Engine and )?Apex (is|are) not installed")
            super().exec_module(module)
        for name, value in self._repairs.items():
            setattr(module, name, value)


class _RewritingLoader(_RepairingLoader):
    """Loads a module rewritten for the CPU and mends it."""

    def get_code(self, fullname: str) -> CodeType:
        """The rewritten source's code: kept bytecode, if it is of this source and this rewrite, else compiled."""
        path = self.get_filename(fullname)
        source = self.get_data(path)
        kept = importlib.util.cache_from_source(path, optimization=_VARIANT)
        digest = importlib.util.source_hash(_rewriter() + path.encode() + source)
        header = importlib.util.MAGIC_NUMBER + _HASHED_BYTECODE + digest
        bytecode = Path(kept).read_bytes() if Path(kept).exists() else b""
        if bytecode.startswith(header):
            loaded: CodeType = marshal.loads(memoryview(bytecode)[len(header) :])
            return loaded
        with collection_paused():  # syntax trees are millions of objects, none of them garbage
            code: CodeType = compile(rewrite_for_cpu(source, path), path, "exec", dont_inherit=True)
        if not sys.dont_write_bytecode:
            self.set_data(
                kept, header + marshal.dumps(code)
            )  # whole or, where that is not allowed, not at all
        return code

    def exec_module(self, module: ModuleType) -> None:
        module.__dict__[SHIM_NAME] = importlib.import_module(SHIM_MODULE)
        super().exec_module(module)


@cache
def _rewriter() -> bytes:
    return Path(source_rewrite.__file__).read_bytes()
