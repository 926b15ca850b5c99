"""One cluster for all tests of this folder; each submits from a folder of its own and leaves no job behind."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.runs import build_data
from tests.support.slurm import Slurm, cluster, missing


@pytest.fixture(scope="session")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    reason = missing()
    if reason:
        pytest.skip(reason)
    with cluster(tmp_path_factory.mktemp("slurm")) as folder:
        yield folder


@pytest.fixture
def slurm(nodes: Path, tmp_path: Path) -> Iterator[Slurm]:
    slurm = Slurm(nodes, tmp_path)
    yield slurm
    slurm.run("scancel", "--user=root", "--full")
    slurm.wait_for_idle("n1", "n2")


@pytest.fixture(scope="session")
def data_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small data in the quickstart's layout; not to be changed."""
    root = tmp_path_factory.mktemp("data")
    build_data(root)
    return root
