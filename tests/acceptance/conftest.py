"""Data that the acceptance tests share."""

from pathlib import Path

import pytest

from tests.support.runs import build_data


@pytest.fixture(scope="session")
def data_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small data in the quickstart's layout; not to be changed."""
    root = tmp_path_factory.mktemp("data")
    build_data(root)
    return root
