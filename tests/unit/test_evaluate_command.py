"""What `launch.evaluate` refuses before it starts ranks or loads anything, and what it shows meanwhile."""

import io
import signal
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from launch.evaluate import evaluate
from launch.rank import quiet_libraries
from megatron_vl.checkpoint.description import Description, write_description
from megatron_vl.config.data import DataConfig
from megatron_vl.config.errors import UserError
from megatron_vl.config.evaluate import ChatConfig, EvaluateConfig, EvaluationConfig
from megatron_vl.config.model import LanguageConfig, ModelConfig
from megatron_vl.config.parallel import ParallelConfig
from megatron_vl.config.train import RunConfig, TrackingConfig
from megatron_vl.data.sample import Sample
from megatron_vl.evaluate.benchmarks.catalog import BENCHMARKS
from megatron_vl.evaluate.items import Item
from megatron_vl.evaluate.progress import SuiteProgress
from megatron_vl.evaluate.suite import Task
from tests.support.runs import CHECKOUT


@pytest.fixture(name="config")
def make_config(tmp_path: Path) -> EvaluateConfig:
    """One that would start ranks."""
    language = LanguageConfig(
        hidden_size=32, num_layers=4, num_heads=4, ffn_hidden_size=64, vocab_size=128, max_positions=64
    )
    (tmp_path / "checkpoint").mkdir()
    description = Description(model=ModelConfig(language=language), image_token_id=1, tokens=None)
    write_description(tmp_path / "checkpoint", description, None)
    (tmp_path / "text.txt").write_text("words")
    return EvaluateConfig(
        checkpoint=str(tmp_path / "checkpoint"),
        evaluation=EvaluationConfig(benchmarks={"text": {"path": str(tmp_path / "text.txt")}}),
        data=DataConfig(tokenizer="tokenizer.json"),
        run=RunConfig(dir=str(tmp_path / "run")),
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mode": "caht"}, "mode=caht: must be one of benchmarks, chat"),
        ({"tracking": TrackingConfig(wandb="on")}, "tracking.wandb=on: must be one of disabled, offline"),
        ({"chat": ChatConfig(max_new_tokens=0)}, "chat.max_new_tokens=0: must be at least 1"),
        ({"chat": ChatConfig(images=["gone.png"])}, "chat.images: gone.png is no file"),
        (
            {"parallel": ParallelConfig(tensor_size=3)},
            "tensor_size=3 does not divide model.language.num_heads",
        ),
        ({"parallel": ParallelConfig(pipeline_size=9)}, "num_layers=4 cannot fill parallel.pipeline_size=9"),
        ({"evaluation": EvaluationConfig()}, "there is nothing to run"),
    ],
)
def test_it_refuses_before_ranks_start(changes: dict[str, Any], message: str, config: EvaluateConfig) -> None:
    with pytest.raises(UserError, match=message):
        evaluate(replace(config, **changes))
    assert not Path(config.run.dir).exists()


def test_ranks_must_fit_the_model_s_division(config: EvaluateConfig) -> None:
    run, parallel = replace(config.run, num_processes=3), ParallelConfig(tensor_size=2)
    with pytest.raises(UserError, match="2 ranks do not divide the 3 ranks"):
        evaluate(replace(config, run=run, parallel=parallel))


def test_a_training_run_s_directory_is_left_alone(config: EvaluateConfig) -> None:
    """Its status and tracker would be taken for this command's."""
    run = Path(config.run.dir)
    run.mkdir()
    (run / "status.json").write_text('{"state": "interrupted", "stage": "sft", "step": 3}')
    with pytest.raises(UserError, match="is where a training run writes; give a directory of its own"):
        evaluate(config)


def test_ctrl_c_ends_a_command_without_a_traceback() -> None:
    """At whatever it is: here, as the task begins."""
    code = """
from launch.command import run_command
def task(config):
    raise KeyboardInterrupt
run_command(task)
"""
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=CHECKOUT, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 128 + signal.SIGINT
    assert not ended.stdout.strip() and not ended.stderr.strip()


def test_libraries_are_quiet() -> None:
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        quiet_libraries()
        for name in ("all_gather_into_tensor", "reduce_scatter_tensor"):  # as torch 2.10 and newer put it
            warnings.warn(
                f"`torch.distributed.{name}` is deprecated. Please use", FutureWarning, stacklevel=1
            )
    assert not shown


@pytest.mark.parametrize("terminal", [True, False])
def test_a_terminal_sees_items_done(terminal: bool) -> None:
    items = [Item(key=str(n), prompt=Sample(text="words")) for n in range(40)]
    tasks = [
        Task(name=name, benchmark=BENCHMARKS[name], items=items, normalization="tokens", num_left_out=0)
        for name in ("gsm8k", "mmlu")
    ]
    screen = Console(file=io.StringIO(), force_terminal=terminal, width=80, color_system=None)
    with SuiteProgress(tasks, screen) as progress:
        progress.update(3, 4)
        progress.end_benchmark()
        progress.update(1, 4)
    assert isinstance(screen.file, io.StringIO)
    shown = screen.file.getvalue()
    assert ("40/40 items" in shown and "10/40 items" in shown) if terminal else not shown
