"""Pictures and traces show the step that was simulated."""

import json
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megatron_vl.planning.candidate import Candidate, Problem
from megatron_vl.planning.memory import Execution
from megatron_vl.planning.setting import Setting
from megatron_vl.planning.steps import StepReplay
from megatron_vl.planning.topology import Topology
from megatron_vl.planning.trace import (
    COLOURS,
    Timeline,
    simulated_timeline,
    write_chrome_trace,
    write_png,
)
from megatron_vl.planning.workload import Workload
from tests.support.clusters import cluster_of, model_of

WORKLOAD = Workload(
    stage="joint",
    trained=frozenset({"adaptor", "embedding", "decoder", "head"}),
    num_steps=1000,
    global_batch_size=1024,
    sequence_length=4096,
    text_ratio=0.7,
    images_per_row=5.0,
    max_images_per_row=7,
    tokens_per_row=4096,
    segment_tokens=4096,
)


def multimodal(placement: str) -> StepReplay:
    topology = Topology(world_size=512, tensor_size=2, pipeline_size=2, virtual_size=3)
    setting = Setting(
        topology=topology,
        layout="",
        sequence_parallel=True,
        micro_batch_size=1,
        vision_placement=placement,
    )
    case = Problem(
        model=model_of("deepseek_vl_7b"),
        workload=WORKLOAD,
        cluster=cluster_of("a100_64x8"),
        execution=Execution(),
    )
    steps = Candidate(case, setting).steps
    return steps.of_kind(steps.kinds[1], np.array([[4, 6, 6, 6, 6, 2]]).T)


@pytest.fixture(params=["replicated", "spread"], scope="module")
def timeline(request: pytest.FixtureRequest) -> Timeline:
    return simulated_timeline("multimodal", multimodal(request.param))


def test_a_timeline_keeps_all_seconds(timeline: Timeline) -> None:
    for spans in timeline.ranks:
        assert all(after.start >= before.end - 1e-9 for before, after in pairwise(spans))
        assert {span.kind for span in spans} <= set(COLOURS)
    assert any(span.kind == "vision" for span in timeline.ranks[0])
    last = max(span.end for spans in timeline.ranks for span in spans)
    assert 0.97 * timeline.seconds < last <= timeline.seconds
    assert f"{timeline.seconds:.4g} s" in timeline.title and "bubble" in timeline.title


def test_images_take_part_of_the_first_chunk_or_come_before_the_pipeline() -> None:
    step = multimodal("replicated")
    spans = simulated_timeline("", step).ranks[0]
    vision = [span for span in spans if span.kind == "vision"]
    assert [span.microbatch for span in vision] == list(range(8))
    passes = step.pipeline.ends[0, 0, :, 0] - step.pipeline.starts[0, 0, :, 0]
    rest = [span.end - span.start for span in spans if span.kind == "forward" and span.chunk == 0]
    np.testing.assert_allclose([span.end - span.start for span in vision] + passes * 0, passes - rest)
    ahead = simulated_timeline("", multimodal("spread"))
    assert all(spans[0].kind == "vision" and spans[0].microbatch is None for spans in ahead.ranks)


def test_a_chrome_trace_has_every_span(timeline: Timeline, tmp_path: Path) -> None:
    write_chrome_trace(tmp_path / "trace.json", [timeline, timeline])
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    spans = [event for event in events if event["ph"] == "X" and event["pid"] == 1]
    assert len(spans) == sum(map(len, timeline.ranks))
    seconds = sum(span.end - span.start for rank in timeline.ranks for span in rank)
    assert sum(event["dur"] for event in spans) == pytest.approx(seconds * 1e6)
    names = [event["args"]["name"] for event in events if event["ph"] == "M"]
    assert timeline.title in names and "pipeline rank 1" in names


def test_a_picture_shows_each_kind_in_proportion(timeline: Timeline, tmp_path: Path) -> None:
    """Pixels of a kind's colour, paler ones of later virtual stages left out, against seconds."""
    first = [[replace(span, chunk=rank) for span in spans] for rank, spans in enumerate(timeline.ranks)]
    plain = replace(timeline, ranks=first)
    write_png(tmp_path / "step.png", [plain])
    pixels = np.asarray(Image.open(tmp_path / "step.png").convert("RGB"))
    pixels = pixels[: int(0.8 * len(pixels))]  # without the legend
    counts, seconds = {}, {}
    for kind, colour in COLOURS.items():
        wanted = [int(colour[place : place + 2], 16) for place in (1, 3, 5)]
        counts[kind] = int((pixels == wanted).all(-1).sum())
        seconds[kind] = sum(
            span.end - span.start for rank in plain.ranks for span in rank if span.kind == kind
        )
    for kind in COLOURS:
        share = counts[kind] / sum(counts.values())
        assert share == pytest.approx(seconds[kind] / sum(seconds.values()), abs=0.05)


def test_only_drawing_needs_matplotlib() -> None:
    check = "import sys, megatron_vl.planning.trace; sys.exit('matplotlib' in sys.modules or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0
