"""`launch.preview` shows what a run trains on: the plans of its ranks, from the start of a stage or a saved state."""

import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path

import hydra
import pytest
from omegaconf import OmegaConf

from data_tools.command import CONFIG_FOLDER
from launch.preview import preview
from megatron_vl.checkpoint.manifest import seal
from megatron_vl.checkpoint.state import STATE_FILE, RunState
from megatron_vl.config.data import SourceConfig
from megatron_vl.config.errors import UserError
from megatron_vl.config.preview import PreviewConfig, register_preview_schema
from megatron_vl.config.root import PretrainConfig, register_schemas
from megatron_vl.data.indexing import build_index
from megatron_vl.data.plan import Planner
from megatron_vl.data.plan_state import PlanState, merge_states
from megatron_vl.data.types import StepPlan
from megatron_vl.train.plan_settings import plan_settings
from megatron_vl.train.replay import replay, saved_plan
from megatron_vl.train.settings import resolve_stages
from megatron_vl.train.sources import Sources, open_sources
from tests.support.tiny_data import BOS, EOS, IMAGE, picture, text_rule, write_source, write_tokenizer

STEP = 9


def composed(name: str, *overrides: str) -> PretrainConfig:
    register_schemas()
    register_preview_schema()
    with hydra.initialize_config_dir(str(CONFIG_FOLDER), version_base="1.3"):
        config = OmegaConf.to_object(hydra.compose(name, list(overrides)))
    assert isinstance(config, PretrainConfig)
    return config


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two indexed sources: 60 texts, 40 pages."""
    root = tmp_path_factory.mktemp("preview")
    rule = text_rule(write_tokenizer(root / "tokenizer.json"))
    write_source(root / "text", {f"t{i}": ({"text": "some words " * (i % 17 + 1)}, {}) for i in range(60)})
    pages = {
        f"p{i}": ({"text": "<image>words " * num}, {f"{n}.png": picture(seed=n) for n in range(num)})
        for i in range(40)
        for num in [i % 2 + 1]
    }
    write_source(root / "pages", pages)
    for name in ("text", "pages"):
        build_index(root / name, rule, max_sample_bytes=10**6)
    return root


@pytest.fixture
def config(root: Path, tmp_path: Path) -> PreviewConfig:
    """Two data-parallel ranks, in groups of one lane each or of both, over four lanes."""
    config = composed(
        "preview", "stages=[joint]", f"step={STEP}", "run.num_processes=2", f"run.dir={tmp_path}"
    )
    assert isinstance(config, PreviewConfig)
    sources = {
        name: SourceConfig(path=str(root / name), modality=modality)
        for name, modality in (("text", "text"), ("pages", "multimodal"))
    }
    config.data = replace(
        config.data,
        sources=sources,
        tokenizer=str(root / "tokenizer.json"),
        bos_token=BOS,
        eos_token=EOS,
        image_token=IMAGE,
        build_command="",
        text_ratio=0.5,
    )
    config.stage.joint.sources = {"text": 1.0, "pages": 1.0}
    config.stage.joint.text_ratio = 0.5
    config.stage.joint.global_batch_size = 8
    return config


def opened(config: PretrainConfig) -> Sources:
    return open_sources(config.data, config.model, resolve_stages(config, 2))


def stepped(config: PretrainConfig) -> Iterator[tuple[list[StepPlan], PlanState]]:
    """The ranks' plans as the ranks of a run make them, one by one, and the state after each step."""
    (stage,), sources = resolve_stages(config, 2), opened(config)
    settings = plan_settings(config, stage, sources)
    ranks = [Planner(sources.tables(), settings, rank, 2) for rank in range(2)]
    while True:
        plans = [rank.next() for rank in ranks]
        yield plans, merge_states([rank.state() for rank in ranks])


def replayed(config: PretrainConfig, step: int) -> tuple[list[StepPlan], list[int]]:
    """The plan of a step, and the steps that were planned for it."""
    planned: list[int] = []
    (stage,) = resolve_stages(config, 2)
    plans = replay(
        config, stage, opened(config), step, lambda done, total: planned.append(step - total + done)
    ).ranks
    return plans, planned


def save(config: PretrainConfig, state: PlanState, name: str, stage: str = "joint") -> None:
    folder = Path(config.run.dir) / "checkpoints" / name
    folder.mkdir(parents=True)
    run_state = RunState(
        stage=stage,
        step=state.step,
        num_steps=100,
        global_step=state.step,
        plan=state.to_json(),
        fingerprint={},
    )
    (folder / STATE_FILE).write_text(json.dumps(asdict(run_state)))
    seal(folder, {})


@pytest.mark.parametrize(
    "overrides", [(), ("experiment=paper_7b",), ("experiment=quickstart", "train.steps=7")]
)
def test_it_reads_what_the_run_reads(overrides: tuple[str, ...]) -> None:
    values = asdict(composed("preview", *overrides))
    for name in ("step", "keys"):
        del values[name]
    assert values == asdict(composed("pretrain", *overrides))


@pytest.mark.parametrize("balance_lanes", [0, 2, 64])
def test_any_step_is_what_the_ranks_plan(config: PreviewConfig, balance_lanes: int) -> None:
    config.data.balance_lanes = balance_lanes
    for step, (plans, _) in zip(range(1, STEP + 1), stepped(config), strict=False):
        if step in (1, STEP):
            assert replayed(config, step) == (plans, list(range(1, step + 1)))


def test_a_run_s_newest_state_before_the_step_is_gone_on_from(config: PreviewConfig) -> None:
    run = stepped(config)
    by_step = {step: next(run) for step in range(1, STEP + 1)}
    for step in (3, 6, 9):
        save(config, by_step[step][1], f"step-{step}")
    save(config, by_step[8][1], "of-another-stage", stage="sft")
    checkpoints = Path(config.run.dir) / "checkpoints"
    saved = saved_plan(checkpoints, "joint", STEP)
    assert saved is not None and saved.step == 6
    assert replayed(config, STEP) == (by_step[STEP][0], [7, 8, 9])
    assert saved_plan(checkpoints, "joint", 3) is None


def test_a_second_look_begins_at_a_bookmark_at_most_a_flush_before(config: PreviewConfig) -> None:
    config.data.flush_steps = 4
    run = stepped(config)
    by_step = {step: next(run)[0] for step in range(1, STEP + 1)}
    assert replayed(config, STEP) == (by_step[STEP], list(range(1, STEP + 1)))
    assert replayed(config, STEP) == (by_step[STEP], [STEP])  # 8 is one
    assert replayed(config, 8) == (by_step[8], [5, 6, 7, 8])
    config.run.seed += 1  # another plan: its bookmarks are its own
    assert replayed(config, 6) == (next(islice(stepped(config), 5, None))[0], [1, 2, 3, 4, 5, 6])
    assert replayed(config, 6)[1] == [5, 6]


def test_what_is_printed_is_the_plan(config: PreviewConfig, capsys: pytest.CaptureFixture[str]) -> None:
    run = stepped(config)
    plans, _ = [next(run) for _ in range(STEP)][-1]
    config.keys = 2
    assert preview(config) == 0
    headline, *lines = capsys.readouterr().out.splitlines()
    num_tokens = sum(pack.num_tokens for plan in plans for pack in plan.packs)
    assert f"stage joint, step {STEP}: {plans[0].modality}, text ratio {plans[0].text_ratio:.3f}" in headline
    assert f"8 rows, {num_tokens:,} tokens" in headline
    printed = " ".join(" ".join(lines).split())
    sources = opened(config)
    for rank, plan in enumerate(plans):
        units = [unit for pack in plan.packs for unit in pack.units]
        assert f" {rank} {len(plan.packs)} {len(units)} {sum(unit.num_images for unit in units)} " in printed
        assert f"{units[0].source}/{sources.training[units[0].source].key(units[0].sample)}," in printed


def test_what_makes_no_sense_is_refused_by_name(config: PreviewConfig) -> None:
    config.stages = ["adaptor", "joint"]
    with pytest.raises(UserError, match=r"stages=\['adaptor', 'joint'\]: name the one"):
        preview(config)
    config.stages, config.step = ["joint"], 251
    with pytest.raises(UserError, match="step=251: stage joint has the steps 1 to 250"):
        preview(config)


def test_a_run_of_other_values_is_named_not_mixed_in(config: PreviewConfig) -> None:
    save(config, next(stepped(config))[1], "step-1")
    config.run.seed += 1
    with pytest.raises(UserError, match=r"run\.seed was 1234 and is 1235"):
        preview(config)
