"""Measured seconds in place of FLOPs: what `launch.plan calibrate=true` stores, and a Timing that reads it.

Every pass over a unit takes `fixed + per_token * tokens + per_pair * pairs + per_image * images` seconds, fitted to
what the unit took at a few loads, on one tensor-parallel rank of a given size.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from megatron_vl.config.cluster import ClusterConfig
from megatron_vl.config.errors import UserError
from megatron_vl.config.model import ModelConfig
from megatron_vl.planning.cost import CostModel
from megatron_vl.planning.timing import ClusterTiming, PassSeconds, Timing, updated_bytes
from megatron_vl.planning.workload import Load

FORMAT = "megatron-vl-calibration-1"
MAX_FILE_BYTES = 10_000_000
ELEMENT_BYTES = {"fp32": 4, "bf16": 2}  # by train.precision


@dataclass(frozen=True, kw_only=True)
class Line:
    """Seconds of one pass, linear in the load."""

    fixed: float = 0.0
    per_token: float = 0.0
    per_pair: float = 0.0
    per_image: float = 0.0

    def at(self, load: Load) -> float:
        return (
            self.fixed
            + self.per_token * load.num_tokens
            + self.per_pair * load.num_pairs
            + self.per_image * load.num_images
        )


@dataclass(frozen=True, kw_only=True)
class UnitLines:
    """The passes over one unit."""

    forward: Line = Line()
    input_gradient: Line = Line()
    weight_gradient: Line = Line()


@dataclass(frozen=True, kw_only=True)
class CalibrationKey:
    """What measured seconds hold for."""

    model: dict[str, Any]  # the sizes of a layer and of the towers, not how many layers there are
    precision: str
    tensor_size: int
    sequence_parallel: bool

    @classmethod
    def of(cls, model: ModelConfig, precision: str, tensor_size: int, sequence_parallel: bool) -> Self:
        sizes = asdict(model)
        del sizes["name"], sizes["language"]["num_layers"], sizes["language"]["init_std"]
        return cls(
            model=sizes, precision=precision, tensor_size=tensor_size, sequence_parallel=sequence_parallel
        )


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Measured seconds for one key. `per_parameter`: of an update on one rank."""

    key: CalibrationKey
    device: str
    units: Mapping[str, UnitLines]
    per_parameter: float

    def unit(self, name: str, load: Load) -> PassSeconds:
        """See planning.timing.Timing. An image has no share in a unit that only tokens pass through, and so on: what
        was not measured apart is part of another unit."""
        lines = self.units.get(name, UnitLines())
        return PassSeconds(
            forward=lines.forward.at(load),
            input_gradient=lines.input_gradient.at(load),
            weight_gradient=lines.weight_gradient.at(load),
        )

    def update(self, num_trained: float, data_size: int) -> float:
        """See planning.timing.Timing. A shard's update takes as much less as it moves."""
        element_bytes = ELEMENT_BYTES[self.key.precision]
        share = updated_bytes(data_size, element_bytes) / updated_bytes(1, element_bytes)
        return self.per_parameter * share * num_trained


def timing_on(
    cluster: ClusterConfig, model: ModelConfig, precision: str, tensor_size: int, sequence_parallel: bool
) -> Timing:
    """Measured times where the cluster has a file of them, else those that follow from its figures.

    Raises:
        UserError: the file cannot be read, or was not made for this model, precision and tensor-parallel size.
    """
    if cluster.calibration is not None:
        key = CalibrationKey.of(model, precision, tensor_size, sequence_parallel)
        return find_calibration(Path(cluster.calibration), key)
    costs = CostModel(
        model=model,
        tensor_size=tensor_size,
        sequence_parallel=sequence_parallel,
        element_bytes=ELEMENT_BYTES[precision],
        folded_positions=cluster.device_type == "cuda",
    )
    return ClusterTiming(cluster=cluster, costs=costs)


def add_calibration(path: Path, calibration: Calibration) -> None:
    """Put it into the file, in place of an earlier one with the same key."""
    kept = [old for old in (_read(path) if path.exists() else []) if old.key != calibration.key]
    text = json.dumps(
        {"format": FORMAT, "entries": [asdict(entry) for entry in [*kept, calibration]]}, indent=1
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(text)
    temporary.replace(path)


def find_calibration(path: Path, key: CalibrationKey) -> Calibration:
    """Raise UserError where the file has nothing for `key`."""
    for calibration in _read(path):
        if calibration.key == key:
            return calibration
    raise UserError(
        f"cluster.calibration={path} holds no times of this model in {key.precision} at parallel.tensor_size="
        f"{key.tensor_size}, sequence_parallel={str(key.sequence_parallel).lower()}: run "
        "launch.plan calibrate=true with these values"
    )


def _read(path: Path) -> list[Calibration]:
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise UserError(
                f"cluster.calibration={path} is larger than {MAX_FILE_BYTES} bytes: no calibration"
            )
        found = json.loads(path.read_text())
        if found["format"] != FORMAT:
            raise UserError(f"cluster.calibration={path}: format {found['format']!r}, must be {FORMAT!r}")
        return [_entry(values) for values in found["entries"]]
    except OSError as error:
        raise UserError(f"cluster.calibration={path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"cluster.calibration={path} is no calibration file ({error!r}); make it anew"
        ) from error


def _entry(values: dict[str, Any]) -> Calibration:
    units = {
        name: UnitLines(**{which: Line(**line) for which, line in passes.items()})
        for name, passes in values["units"].items()
    }
    return Calibration(
        key=CalibrationKey(**values["key"]),
        device=values["device"],
        units=units,
        per_parameter=values["per_parameter"],
    )
