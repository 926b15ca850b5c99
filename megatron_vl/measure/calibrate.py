"""Calibration: lines over the load, fitted to the seconds that units of a model take on the present device."""

from collections.abc import Callable, Mapping, Sequence
from statistics import median

import numpy as np
import torch.distributed as dist
from scipy.optimize import nnls

from megatron_vl.measure.timing import Timed, TimedUnit, time_units
from megatron_vl.planning.calibration import Line, UnitLines


def measure_units(
    units: Mapping[str, TimedUnit],
    clock: Callable[[], float],
    rounds: int,
    told: Callable[[int], None],
) -> dict[str, UnitLines]:
    """The units' lines, by the mean of all ranks. Collective: the ranks of one tensor-parallel group call it."""
    timed = time_units(units, clock, rounds, told)
    by_rank: list[dict[str, list[Timed]]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(by_rank, timed)
    return {
        name: fit_unit([entry for rank in by_rank for entry in rank[name]], unit.drivers)
        for name, unit in units.items()
    }


def measure_update(update: Callable[[], None], clock: Callable[[], float], rounds: int) -> float:
    """Median seconds of what a step does beside its forward and backward passes."""
    seconds = []
    for _ in range(rounds + 1):
        begun = clock()
        update()
        seconds.append(clock() - begun)
    return median(seconds[1:])


def fit_unit(timed: Sequence[Timed], drivers: Sequence[str]) -> UnitLines:
    """Lines over the `drivers` among the load's fields, through what a unit took. Weights cost what the whole backward
    pass took more than the input's."""
    return UnitLines(
        forward=_fit(timed, [entry.forward for entry in timed], drivers),
        input_gradient=_fit(timed, [entry.input_backward for entry in timed], drivers),
        weight_gradient=_fit(
            timed, [max(0.0, entry.whole_backward - entry.input_backward) for entry in timed], drivers
        ),
    )


def _fit(timed: Sequence[Timed], seconds: Sequence[float], drivers: Sequence[str]) -> Line:
    """Least squares of relative errors, with no negative coefficient."""
    wanted = np.array(seconds)
    if not wanted.any():
        return Line()
    columns = np.array([[1.0, *(getattr(entry.load, driver) for driver in drivers)] for entry in timed])
    scale = np.maximum(wanted, wanted.max() * 1e-3)
    unit = columns.max(axis=0)  # columns of one size make the fit well-conditioned
    fixed, *slopes = (nnls(columns / unit / scale[:, None], wanted / scale)[0] / unit).tolist()
    names = {driver: f"per_{driver.removeprefix('num_').removesuffix('s')}" for driver in drivers}
    return Line(fixed=fixed, **{names[driver]: slope for driver, slope in zip(drivers, slopes, strict=True)})
