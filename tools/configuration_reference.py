"""Writes docs/configuration.md from the schemas in megatron_vl/config and the values in hydra_conf.

    python -m tools.configuration_reference

A field's words are the comment beside it in its schema, its value is what the command has without overrides.
"""

import ast
import inspect
import re
import sys
import tokenize
from collections.abc import Iterator
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from io import StringIO
from pathlib import Path
from textwrap import dedent
from typing import Any, get_args, get_type_hints

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from megatron_vl.config.convert import ConvertConfig, register_convert_schema
from megatron_vl.config.evaluate import BenchmarkConfig, EvaluateConfig, register_evaluate_schema
from megatron_vl.config.plan import PlanConfig, register_plan_schema
from megatron_vl.config.preview import PreviewConfig, register_preview_schema
from megatron_vl.config.root import PretrainConfig, register_schemas

CHECKOUT = Path(__file__).parent.parent
VALUES = CHECKOUT / "hydra_conf"
PAGE = CHECKOUT / "docs" / "configuration.md"
COMMANDS: dict[str, type] = {
    "pretrain": PretrainConfig,
    "plan": PlanConfig,
    "preview": PreviewConfig,
    "evaluate": EvaluateConfig,
    "convert": ConvertConfig,
}
GROUPS = (
    "model",
    "stage",
    "data",
    "parallel",
    "cluster",
    "evaluation",
    "tracking",
    "experiment",
    "experiment/ablation",
)
HEAD = """\
# Configuration

Every field that a command takes, and its value without overrides (of the tiny model, the quickstart's data). `python
-m tools.configuration_reference` writes this page from `megatron_vl/config/` and `hydra_conf/`.

`field=value` on the command line sets a field, `group=option` chooses a file of `hydra_conf/`, `+field.NAME=value` adds
an entry to a dictionary, `~field.NAME` takes one away. An unknown field, or a value of another type, is refused.
`--cfg job --resolve` prints the configuration that overrides make, and nothing runs. [sweeps.md](sweeps.md) tells how
to vary fields.
"""


@dataclass(frozen=True)
class Section:
    """A schema, and where the configuration of `command` holds one; NAME in a path is any."""

    schema: type
    command: str
    paths: list[str]


def page() -> str:
    """The whole reference."""
    for register in (
        register_schemas,
        register_plan_schema,
        register_preview_schema,
        register_evaluate_schema,
        register_convert_schema,
    ):
        register()
    with initialize_config_dir(str(VALUES), version_base="1.3"):
        composed = {command: compose(command) for command in COMMANDS}
    parts = [HEAD, _groups()]
    title = ""
    for section in sections():
        if section.command != title:
            title = section.command
            more = (
                "" if title in ("pretrain", "evaluate", "convert") else ", beside all of `launch.pretrain`'s"
            )
            parts.append(f"\n## Fields of launch.{title}\n\n`python -m launch.{title}` reads these{more}.\n")
        parts.append(_section(section, composed[section.command]))
    return "".join(parts)


def sections() -> list[Section]:
    """Each schema once, where a command first reads it, in the order of its fields."""
    found: dict[type, Section] = {}
    for command, root in COMMANDS.items():
        for schema, path in _walk(root, ""):
            if schema not in found:
                found[schema] = Section(schema, command, [])
            if found[schema].command == command:
                found[schema].paths.append(path)
    return list(found.values())


def _walk(schema: type, path: str) -> Iterator[tuple[type, str]]:
    yield schema, path
    hints = get_type_hints(schema)
    for entry in _own_fields(schema):
        inner = f"{path}.{entry.name}" if path else entry.name
        for kind in (hints[entry.name], *get_args(hints[entry.name])):
            if is_dataclass(kind) and isinstance(kind, type):
                is_named = kind is not hints[entry.name] and dict in _origins(hints[entry.name])
                yield from _walk(kind, f"{inner}.NAME" if is_named else inner)
    if schema is EvaluateConfig:  # checked apart: Hydra cannot add to a dictionary of dataclasses
        yield BenchmarkConfig, "evaluation.benchmarks.NAME"


def _shared(root: type, own: list[Section]) -> str:
    """Which parts of the configuration another command's section describes."""
    told = {path.split(".")[0] for section in own for path in section.paths}
    hints = get_type_hints(root)
    names = [
        f"`{entry.name}`"
        for entry in fields(root)
        if is_dataclass(hints[entry.name]) and entry.name not in told
    ]
    return f"\nAs above: {', '.join(names)}. And these:\n" if names else ""


def _origins(hint: Any) -> set[Any]:
    return {getattr(hint, "__origin__", hint)}


def _own_fields(schema: type) -> list[Field[Any]]:
    """Without those of a command that it builds on."""
    inherited = {entry.name for base in schema.__bases__ if is_dataclass(base) for entry in fields(base)}
    return [entry for entry in fields(schema) if entry.name not in inherited]


def _section(section: Section, composed: DictConfig) -> str:
    rows = [_row(section, entry, composed) for entry in _own_fields(section.schema)]
    rows = [row for row in rows if row]
    if not rows:
        return ""
    paths = [path for path in section.paths if path]
    heading = "\n### " + (", ".join(f"`{path}`" for path in paths) if paths else "At the top") + "\n\n"
    said = _spelled_out(inspect.cleandoc(section.schema.__doc__ or ""), section.schema)
    words = "" if not paths or said.startswith(f"{section.schema.__name__}(") else f"{said}\n\n"
    return f"{heading}{words}| Field | Type | Value | |\n|---|---|---|---|\n{''.join(rows)}"


def _row(section: Section, entry: Field[Any], composed: DictConfig) -> str:
    """Nothing for a field that has a section of its own."""
    kind, comment = _source(section.schema)[entry.name]
    hint = get_type_hints(section.schema)[entry.name]
    if any(is_dataclass(one) for one in (hint, *get_args(hint))) and dict not in _origins(hint):
        return ""
    values = [_value(f"{path}.{entry.name}".removeprefix("."), entry, composed) for path in section.paths]
    is_named = any(is_dataclass(one) for one in get_args(hint))
    shown = "by `NAME`" if is_named else " / ".join(dict.fromkeys(f"`{_yaml(value)}`" for value in values))
    return f"| `{entry.name}` | `{_cell(kind)}` | {_cell(shown)} | {_cell(_spelled_out(comment, section.schema))} |\n"


def _value(path: str, entry: Field[Any], composed: DictConfig) -> Any:
    """What the command has there, or the schema's own where a path is of any name."""
    if "NAME" not in path:
        selected = OmegaConf.select(composed, path)
        return OmegaConf.to_container(selected, resolve=True) if OmegaConf.is_config(selected) else selected
    if entry.default is not MISSING:
        return entry.default
    return entry.default_factory() if entry.default_factory is not MISSING else None


def _yaml(value: Any) -> str:
    text = (
        OmegaConf.to_yaml(OmegaConf.create({"value": value}))
        if not isinstance(value, dict | list)
        else str(value)
    )
    return text.removeprefix("value: ").strip().removeprefix("value:").strip() or "{}"


def _spelled_out(text: str, schema: type) -> str:
    """With the values that a schema's module has under a name such as MODES."""

    def values(match: re.Match[str]) -> str:
        named = getattr(sys.modules[schema.__module__], match[0], None)
        return ", ".join(named) if isinstance(named, tuple) else match[0]

    return re.sub(r"\b[A-Z][A-Z_]{2,}\b", values, text)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _source(schema: type) -> dict[str, tuple[str, str]]:
    """Field -> its type as written and the comment beside it."""
    text = dedent(inspect.getsource(schema))
    comments = {
        token.start[0]: token.string.lstrip("# ")
        for token in tokenize.generate_tokens(StringIO(text).readline)
        if token.type == tokenize.COMMENT
    }
    found = {}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            lines = range(node.lineno, (node.end_lineno or node.lineno) + 1)
            words = " ".join(comments[line] for line in lines if line in comments)
            found[node.target.id] = (ast.unparse(node.annotation), words)
    return found


def _groups() -> str:
    """The options of each group with the comment that its file begins with."""
    lines = ["\n## Groups\n\n| Choice | |\n|---|---|\n"]
    for group in GROUPS:
        for file in sorted((VALUES / group).glob("*.yaml")):
            words = " ".join(_opening(file.read_text(encoding="utf-8")))
            first = re.split(r"(?<=[^.]\.) (?=[A-Z])", words)[0]
            name = f"experiment=ablation/{file.stem}" if "/" in group else f"{group}={file.stem}"
            lines.append(f"| `{name}` | {_cell(first)} |\n")
    return "".join(lines)


def _opening(text: str) -> Iterator[str]:
    for line in text.splitlines():
        if not line.startswith("#"):
            return
        if "@package" not in line:
            yield line.lstrip("# ")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE}")
