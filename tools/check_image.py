"""Says what the image for GPUs has, and ends its build where that does not fit together.

    python tools/check_image.py --base base.txt --versions versions.txt

base.txt is `pip list --format=freeze` before this project was installed: torch must still be that one. What
TransformerEngine may be is what megatron-core's own metadata says.
"""

import argparse
import re
import sys
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

REQUIRED = ("torch", "megatron-core", "transformer-engine", "flash-attn", "apex")
CONSTRAINTS = Path(__file__).parent.parent / "constraints.txt"


def main(arguments: list[str]) -> int:
    """Write the versions, print what is wrong. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--versions", type=Path, required=True)
    given = parser.parse_args(arguments)
    found = {name: installed(name) for name in REQUIRED}
    text = "".join(f"{name}=={found[name] or 'missing'}\n" for name in REQUIRED)
    given.versions.write_text(text, encoding="utf-8")
    print(text, end="")
    wrong = problems(found, pins(given.base), pins(CONSTRAINTS), transformer_engine_of_megatron_core())
    for problem in wrong:
        print(f"error: {problem}", file=sys.stderr)
    return 1 if wrong else 0


def problems(
    found: dict[str, str | None], base: dict[str, str], ours: dict[str, str], engine: Requirement
) -> list[str]:
    """What does not fit, one line each."""
    wrong = [f"{name} is not installed" for name, number in found.items() if number is None]
    for name, wanted, whose in (
        ("torch", base, "the base image"),
        ("megatron-core", ours, "constraints.txt"),
    ):
        if found[name] is not None and found[name] != wanted.get(name):
            wrong.append(f"{name} is {found[name]}, but {whose} has {wanted.get(name)}")
    number = found["transformer-engine"]
    if number is not None and not engine.specifier.contains(number, prereleases=True):
        wrong.append(
            f"transformer-engine is {number}, but megatron-core {found['megatron-core']} asks for "
            f"{engine.specifier}: choose another BASE"
        )
    return wrong


def pins(file: Path) -> dict[str, str]:
    """name==version lines, by canonical name."""
    lines = re.findall(r"^([\w.-]+)==(\S+)$", file.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {canonicalize_name(name): number for name, number in lines}


def transformer_engine_of_megatron_core() -> Requirement:
    """What the installed megatron-core names. Raises LookupError where it names nothing."""
    for line in distribution("megatron-core").requires or ():
        requirement = Requirement(line)
        if canonicalize_name(requirement.name) == "transformer-engine":
            return requirement
    raise LookupError("megatron-core's metadata names no TransformerEngine")


def installed(name: str) -> str | None:
    """The version of a distribution; None where it is missing."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
