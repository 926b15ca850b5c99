"""Debian packages as raw material: downloaded by apt-get and unpacked by dpkg, without being installed or root.

data/raw/debian/NAME          what the package holds, as it would lie below /
data/raw/debian/NAME/VERSION  the version that it is of
"""

import fcntl
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_vl.config.data import DataConfig
from megatron_vl.config.errors import UserError

FOLDER = Path("data/raw/debian")
VERSION_NAME = "VERSION"
TIMEOUT = 1800  # seconds for one package
NAME = re.compile(r"(?P<name>[a-z0-9][a-z0-9+.-]+)(=(?P<version>[A-Za-z0-9.+:~-]+))?")


def fetch_packages(config: DataConfig, report: Callable[[str], None]) -> None:
    """Every package of `data.sources.*.raw.packages` is in FOLDER afterwards: `NAME`, or `NAME=VERSION`.

    One that is there is used as it is, without network. Raises UserError: there is no apt-get, or it knows no such
    package or version, or cannot reach its server.
    """
    for source, values in config.sources.items():
        for package in values.raw.packages if values.raw is not None else ():
            match = NAME.fullmatch(package)
            if match is None:
                raise UserError(
                    f"data.sources.{source}.raw.packages has {package!r}; NAME or NAME=VERSION is needed"
                )
            with _only_one(match["name"]):
                _fetch(match["name"], match["version"], report)


def _fetch(name: str, version: str | None, report: Callable[[str], None]) -> None:
    folder, aside = FOLDER / name, FOLDER / f"{name}.unfinished"
    if folder.is_dir():
        recorded = folder / VERSION_NAME
        found = recorded.read_text().strip() if recorded.exists() else "unknown"  # one that was brought here
        if version in (None, found):
            report(f"{folder} is version {found} of the package; it is used as it is")
            return
    shutil.rmtree(aside, ignore_errors=True)
    download = aside / "download"
    download.mkdir(parents=True)
    package = name if version is None else f"{name}={version}"
    report(f"fetching the Debian package {package}")
    _run(["apt-get", "download", package], download, package)
    files = sorted(download.glob("*.deb"))
    if len(files) != 1:
        raise UserError(
            f"apt-get download {package} left {len(files)} files in {download}; one .deb is needed"
        )
    unpacked = aside / name
    _run(["dpkg", "-x", files[0].name, "../" + name], download, package)
    found = files[0].stem.split("_")[1].replace("%3a", ":")  # NAME_VERSION_ARCHITECTURE.deb
    (unpacked / VERSION_NAME).write_text(found + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    unpacked.rename(folder)
    shutil.rmtree(aside)
    report(f"{folder} is version {found} of the package")


def _run(command: list[str], folder: Path, package: str) -> None:
    what = " ".join(command[:2])
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
            check=False,
        )
    except FileNotFoundError as error:
        raise UserError(
            f"{package} is a Debian package, and this machine has no {command[0]}: build on Debian or Ubuntu, or "
            f"unpack the package elsewhere and bring the folder {FOLDER}"
        ) from error
    except subprocess.TimeoutExpired as error:
        raise UserError(f"{what} was not done with {package} in {TIMEOUT} seconds") from error
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith(("E:", "dpkg"))] or lines
        raise UserError(
            f"{what} cannot get {package}: {' '.join(errors)[:500]} (its lists of packages are refreshed by "
            "apt-get update, as root)"
        )


@contextmanager
def _only_one(name: str) -> Iterator[None]:
    """Waits while another process fetches the same package."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    with (FOLDER / f".{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
