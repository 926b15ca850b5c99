"""The progress display says where the run is, on a terminal and in a log, and nothing on silent ranks."""

import io
from dataclasses import replace

import pytest
from rich.console import Console

from megatron_vl.train.metrics import StepMetrics
from megatron_vl.train.progress import TrainingProgress
from tests.support.metrics import ROW

STAGES = [("adaptor", 4), ("joint", 10)]


def row(stage: str, step: int, modality: str = "multimodal", loss: float = 2.5) -> StepMetrics:
    return replace(ROW, stage=stage, step=step, modality=modality, loss=loss)


def console(terminal: bool, width: int = 140) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=width, color_system=None)


def shown(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_a_log_gets_few_whole_lines() -> None:
    screen = console(terminal=False, width=40)
    with TrainingProgress(STAGES, console=screen, line_seconds=1000) as progress:
        progress.begin_stage("adaptor")
        for step in range(1, 5):
            progress.update(row("adaptor", step))
        progress.begin_stage("joint", done=6)
        progress.update(row("joint", 7))
        progress.say("checkpoint [bold] saved")
    lines = shown(screen).splitlines()
    assert lines[0] == "stage adaptor: 4 steps"
    assert lines[1].startswith("adaptor 1/4 · multimodal loss 2.5000 · 4,096 tokens/s · 0:00:0")
    assert lines[2].startswith("adaptor 4/4 ")
    assert lines[3] == "stage joint: 10 steps, 6 of them done"
    assert lines[4:] == ["checkpoint [bold] saved"]


@pytest.mark.parametrize(("width", "both"), [(140, True), (80, False)])
def test_a_terminal_shows_every_stage_and_the_last_step(width: int, both: bool) -> None:
    screen = console(terminal=True, width=width)
    with TrainingProgress(STAGES, console=screen) as progress:
        progress.begin_stage("adaptor")
        for step in range(1, 5):
            progress.update(row("adaptor", step, modality="text", loss=5.25))
        progress.begin_stage("joint")
        progress.update(row("joint", 1, modality="text", loss=4.5))
        progress.update(row("joint", 2))
    final = [line for line in shown(screen).splitlines() if "loss" in line][-2:]
    assert "4/4" in final[0] and "text loss 5.250" in final[0]
    assert "2/10" in final[1] and "multimodal loss 2.500" in final[1] and "4,096 tokens/s" in final[1]
    assert ("text loss 4.500" in final[1]) == both


def test_a_silent_rank_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    with TrainingProgress(STAGES, enabled=False) as progress:
        progress.begin_stage("adaptor")
        progress.update(row("adaptor", 1))
        progress.say("checkpoint saved")
    assert capfd.readouterr() == ("", "")
