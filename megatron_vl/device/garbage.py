"""The garbage collector kept from looking at what cannot be garbage."""

import contextlib
import gc
from collections.abc import Iterator
from typing import Self


@contextlib.contextmanager
def collection_paused() -> Iterator[None]:
    """While many objects are made that all stay: collections would look at each of them again and again."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


class Collector:
    """Garbage is collected when a step says so: on all ranks at the same one, lest each in turn holds up the others.

    Use as a context manager; automatic collection is off while it is open.
    """

    def __init__(self, every: int) -> None:
        """`every`: steps from one collection to the next."""
        self._every = every
        self._was_enabled = gc.isenabled()

    def __enter__(self) -> Self:
        gc.disable()
        return self

    def __exit__(self, *error: object) -> None:
        gc.unfreeze()
        if self._was_enabled:
            gc.enable()

    def settle(self) -> None:
        """Collect everything now, and spare what is left from collections to come: it stays."""
        gc.unfreeze()
        gc.collect()
        gc.freeze()

    def let_go(self) -> None:
        """Collect what was settled and is used no longer: models refer to themselves."""
        gc.unfreeze()
        gc.collect()

    def collect_if_due(self, step: int) -> None:
        """Collect after every so many steps."""
        if step % self._every == 0:
            gc.collect()

    @contextlib.contextmanager
    def automatic(self) -> Iterator[None]:
        """Collect as Python sees fit: for what takes long and makes much between two steps."""
        gc.enable()
        try:
            yield
        finally:
            gc.disable()
