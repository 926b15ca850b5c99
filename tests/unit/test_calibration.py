"""Measured times: lines are found again, files come back as they were, and what is no calibration is refused."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from megatron_vl.config.cluster import ClusterConfig
from megatron_vl.config.errors import UserError
from megatron_vl.measure.calibrate import fit_unit
from megatron_vl.measure.timing import Timed, TimedUnit, time_units
from megatron_vl.planning.calibration import (
    Calibration,
    CalibrationKey,
    Line,
    UnitLines,
    add_calibration,
    find_calibration,
    timing_on,
)
from megatron_vl.planning.workload import Load
from tests.support.training import tiny_model

LOADS = (
    Load(num_tokens=512, num_images=0, num_pairs=512 * 256),
    Load(num_tokens=256, num_images=0, num_pairs=256 * 128),
    Load(num_tokens=512, num_images=0, num_pairs=512 * 64),
)
ELSEWHERE = Load(num_tokens=4096, num_images=0, num_pairs=4096 * 700)
seconds = st.floats(1e-7, 1e-3)


def line(fixed: float, per_token: float, per_pair: float) -> Line:
    return Line(fixed=fixed * 100, per_token=per_token, per_pair=per_pair * 1e-3)


@given(forward=st.tuples(seconds, seconds, seconds), backward=st.tuples(seconds, seconds, seconds))
def test_lines_are_found_again(forward: tuple[float, ...], backward: tuple[float, ...]) -> None:
    expected = UnitLines(
        forward=line(*forward), input_gradient=line(*backward), weight_gradient=line(*reversed(forward))
    )
    timed = [
        Timed(
            load=load,
            forward=expected.forward.at(load),
            input_backward=expected.input_gradient.at(load),
            whole_backward=expected.input_gradient.at(load) + expected.weight_gradient.at(load),
        )
        for load in LOADS
    ]
    found = fit_unit(timed, ("num_tokens", "num_pairs"))
    for name in ("forward", "input_gradient", "weight_gradient"):
        assert getattr(found, name).at(ELSEWHERE) == pytest.approx(
            getattr(expected, name).at(ELSEWHERE), rel=1e-3
        )


def test_a_unit_without_backward_pass_has_none() -> None:
    timed = [Timed(load=load, forward=1.0, input_backward=0.0, whole_backward=0.0) for load in LOADS[:2]]
    found = fit_unit(timed, ("num_tokens",))
    assert found.input_gradient == found.weight_gradient == Line()
    assert found.forward.per_pair == found.forward.per_image == 0


class Ticking(nn.Module):
    """Moves a clock by known amounts: 2 forward, 3 for the input's gradient, 4 more for the weight's."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.now = 0.0

    def forward(self, x: Tensor) -> Tensor:
        self.now += 2
        y = x * self.weight if self.weight.requires_grad else x * 1
        trains = self.weight.requires_grad

        def tick(gradient: Tensor) -> None:
            self.now += 3 + 4 * trains

        y.register_hook(tick)
        return y


def test_passes_are_told_apart_and_shared_by_modules() -> None:
    module = Ticking()

    def prepare(load: Load):  # type: ignore[no-untyped-def]
        x = torch.ones(int(load.num_tokens), requires_grad=True)
        return lambda: module(x)

    unit = TimedUnit(module=module, loads=LOADS[:1], prepare=prepare, drivers=("num_tokens",), num_modules=2)
    rounds: list[int] = []
    ((timed,),) = time_units({"ticking": unit}, lambda: module.now, 3, rounds.append).values()
    assert (timed.forward, timed.input_backward, timed.whole_backward) == (1.0, 1.5, 3.5)
    assert rounds == [0, 1, 2, 3]
    assert module.weight.requires_grad


def calibration(tensor_size: int = 1, per_parameter: float = 1e-9) -> Calibration:
    key = CalibrationKey.of(tiny_model(), "fp32", tensor_size, False)
    units = {"head": UnitLines(forward=Line(fixed=0.5, per_token=0.25))}
    return Calibration(key=key, device="cpu", units=units, per_parameter=per_parameter)


def test_a_file_keeps_one_entry_for_each_key(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "times.json"
    for entry in (calibration(1), calibration(2), calibration(1, per_parameter=2e-9)):
        add_calibration(path, entry)
    assert find_calibration(path, calibration(1).key) == calibration(1, per_parameter=2e-9)
    assert find_calibration(path, calibration(2).key) == calibration(2)


def test_the_number_of_layers_is_free(tmp_path: Path) -> None:
    add_calibration(tmp_path / "times.json", calibration())
    cluster = ClusterConfig(calibration=str(tmp_path / "times.json"))
    deeper = replace(tiny_model(), name="deeper", language=replace(tiny_model().language, num_layers=40))
    timing = timing_on(cluster, deeper, "fp32", 1, False)
    assert timing.unit("head", LOADS[0]).forward == 0.5 + 0.25 * 512
    assert timing.unit("loss", LOADS[0]).forward == 0.0
    assert timing.update(1000, 1) == pytest.approx(1000 * 1e-9)
    assert timing.update(1000, 8) < timing.update(1000, 1) / 2
    wider = replace(tiny_model(), language=replace(tiny_model().language, hidden_size=256))
    for model, precision, size in ((wider, "fp32", 1), (deeper, "bf16", 1), (deeper, "fp32", 2)):
        with pytest.raises(UserError, match="calibrate=true"):
            timing_on(cluster, model, precision, size, False)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"format": "other", "entries": []}',
        '{"format": "megatron-vl-calibration-1", "entries": [1]}',
    ],
)
def test_what_is_no_calibration_is_refused_by_name(tmp_path: Path, text: str) -> None:
    path = tmp_path / "times.json"
    path.write_text(text)
    with pytest.raises(UserError, match=r"cluster\.calibration=.*times\.json"):
        find_calibration(path, calibration().key)
    with pytest.raises(UserError, match=r"cluster\.calibration=.*none\.json"):
        find_calibration(tmp_path / "none.json", calibration().key)
