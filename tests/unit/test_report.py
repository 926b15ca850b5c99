"""The report counts right, is one page on its own, and degrades part by part."""

import base64
import io
import json
import re
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from megatron_vl.checkpoint.store import Saved
from megatron_vl.train.metrics import (
    BenchmarkScore,
    HeldoutLoss,
    ImageUse,
    JsonLines,
    StartupSeconds,
    read_rows,
)
from megatron_vl.train.report import tables, write_report
from megatron_vl.train.report.figures import VARIABLES
from megatron_vl.train.run_dir import RunDirectory, RunStatus
from tests.support.metrics import ROW

SECTIONS = (
    "loss",
    "image-use",
    "heldout",
    "benchmarks",
    "samples",
    "mixture",
    "throughput",
    "pipeline",
    "startup",
    "checkpoints",
)
VOID = {"meta", "img", "br", "path", "use", "rect"}


class Page(HTMLParser):
    """Checks that tags close in order; gathers ids, addresses, and text by section."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.addresses: list[str] = []
        self.sections: dict[str, str] = {}
        self.tags: Counter[str] = Counter()
        self.section = ""
        self.feed(text)
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        values = dict(attrs)
        self.ids += [value for name, value in attrs if name == "id" and value]
        self.addresses += [v for name, v in attrs if name in ("src", "href", "xlink:href") and v]
        if tag == "section":
            self.section = values["id"] or ""
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag
        self.section = "" if tag == "section" else self.section

    def handle_data(self, data: str) -> None:
        self.sections[self.section] = self.sections.get(self.section, "") + " " + data


def png() -> str:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def write_steps(run: RunDirectory) -> None:
    rows = JsonLines(run.metrics)
    for number in range(1, 31):
        stage, step = ("adaptor", number) if number <= 10 else ("joint", number - 10)
        text = stage == "joint" and step % 2 == 1
        rows.append(
            replace(
                ROW,
                stage=stage,
                step=step,
                global_step=number,
                modality="text" if text else "multimodal",
                loss=float("nan") if number == 5 else 8.0 / number,
                loss_by_source={"code": 9.0 / number} if text else {"pages": 7.0 / number, "figures": 6.0},
                num_images=0 if text else 26,
                mfu=None if text else 0.375,
                mfu_with_vision=None if text else 0.4,
                text_ratio=0.0 if stage == "adaptor" else 0.5,
                text_share=float(text),
                skipped=number == 5,
            )
        )


def write_heldout(run: RunDirectory) -> None:
    rows = JsonLines(run.heldout)
    measured = [
        ("adaptor", 0, 1, 7.125),
        ("adaptor", 5, 5, 3.5),
        ("adaptor", 10, 10, 0.0625),
        ("joint", 0, 11, 1.25),
    ]
    for stage, step, global_step, loss in measured:
        row = HeldoutLoss(
            stage=stage, step=step, global_step=global_step, source="pages", loss=loss, num_samples=99
        )
        rows.append(row)


def write_image_use(run: RunDirectory) -> None:
    use = ImageUse(
        stage="joint",
        global_step=30,
        source="pages",
        right=0.5,
        wrong=9.25,
        difference=8.75,
        low=8.125,
        high=9.375,
        num_samples=77,
    )
    rows = JsonLines(run.image_use)
    rows.append(use)
    rows.append(replace(use, source="figures", low=-0.25))


def write_timeline(run: RunDirectory) -> None:
    rows = JsonLines(run.timeline)
    events = [
        {"pp_rank": rank, "kind": kind, "start": start + 0.1 * rank, "end": start + 0.1 * rank + 0.05}
        for rank in range(2)
        for kind, start in (("forward", 4.0), ("backward", 4.2))
    ]
    for step, modality, bubble in ((2, "multimodal", 0.25), (20, "text", 0.5), (20, "multimodal", 0.75)):
        row = {"stage": "joint", "step": step, "global_step": 10 + step, "modality": modality}
        rows.append({**row, "bubble_fraction": bubble, "events": events})


def write_samples(run: RunDirectory) -> None:
    samples = [
        {
            "image_png_base64": png(),
            "prompt": "Read <this>.",
            "target": "river stone",
            "answer": "river stone",
        },
        {"image_png_base64": png(), "target": "x < y & z", "answer": ""},
    ]
    run.samples.write_text(json.dumps(samples))


def write_benchmarks(run: RunDirectory) -> None:
    rows = JsonLines(run.benchmarks)
    score = BenchmarkScore(
        stage="joint",
        step=10,
        global_step=10,
        benchmark="pope",
        method="generate",
        metric="f1",
        value=0.375,
        num_items=9000,
    )
    for row in (
        score,
        replace(score, metric="f1/adversarial", value=0.123),
        replace(score, step=20, global_step=20, value=0.875),
        replace(score, step=20, global_step=20, benchmark="text", metric="bits_per_byte", value=1.25),
    ):
        rows.append(row)


def write_configuration(run: RunDirectory) -> None:
    run.write_config({"model": {"name": "tiny<1>"}}, "0123456789abcdef", {"torch": "2.13.0"})


def write_startup(run: RunDirectory) -> None:
    rows = JsonLines(run.startup)
    for stage, seconds, slowest in (
        ("adaptor", {"imports": 99.0}, {"imports": 99.0}),  # an earlier start of the stage
        ("adaptor", {"imports": 4.5, "first step": 2.0}, {"imports": 9.25, "first step": 2.5}),
        ("joint", {"first step": 1.0}, {"first step": 1.0}),
    ):
        rows.append(StartupSeconds(stage=stage, step=1, global_step=1, seconds=seconds, slowest=slowest))


def write_savings(run: RunDirectory) -> None:
    rows = JsonLines(run.checkpoint_costs)
    for step, stall in ((10, 0.25), (20, 0.5), (30, 4.0)):
        saved = Saved(
            stage="joint",
            step=step,
            global_step=step,
            name=f"joint-{step:08d}",
            optimizer_sharding="dp_reshardable",
            asynchronous=True,
            num_bytes=98_000_000_000,
            host_bytes=190_000_000,
            stall_seconds=stall,
            write_seconds=2.0,
        )
        rows.append(saved)


WRITERS = {
    "metrics": write_steps,
    "heldout": write_heldout,
    "image_use": write_image_use,
    "timeline": write_timeline,
    "samples": write_samples,
    "benchmarks": write_benchmarks,
    "config": write_configuration,
    "startup": write_startup,
    "checkpoints": write_savings,
}


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    run = RunDirectory(tmp_path / "my run")
    run.acquire()
    return run


def written(run: RunDirectory, *parts: str) -> str:
    for part in parts:
        WRITERS[part](run)
    path = write_report(run)
    assert path == run.report
    return path.read_text(encoding="utf-8")


def test_a_full_report_stands_alone(run: RunDirectory) -> None:
    run.write_status(RunStatus("stopped", "joint", 20))
    text = written(run, *WRITERS)
    page = Page(text)
    assert [name for name in page.sections if name] == list(SECTIONS)
    assert "Not there yet" not in text
    assert all(address.startswith(("#", "data:image/png;base64,")) for address in page.addresses)
    assert not re.search(r"@import|url\((?!#)|<script|<link", text)
    assert page.tags["img"] == 2
    assert page.tags["svg"] == 7  # loss twice, held-out, mixture, throughput, and a timeline of each modality
    assert len(page.ids) == len(set(page.ids))
    used = {address[1:] for address in page.addresses if address.startswith("#")}
    used |= set(re.findall(r"url\(#([^)]*)\)", text))
    assert used <= set(page.ids)
    assert "stopped · joint, step 20" in " ".join(page.sections[""].split())


def test_figures_take_the_pages_colours(run: RunDirectory) -> None:
    text = written(run, *WRITERS)
    for name, colour in VARIABLES.items():
        assert colour not in text
        assert text.count(f"var(--{name})") > 1
        assert len(re.findall(rf"--{name}: #", text)) == 2  # light and dark


def test_the_page_says_what_the_files_say(run: RunDirectory) -> None:
    page = Page(written(run, *WRITERS))
    sections = {name: " ".join(text.split()) for name, text in page.sections.items()}
    assert "pages 99 7.125 0.062 1.250 –" in sections["heldout"]
    assert "joint pages 77 0.500 9.250 8.750 8.125 to 9.375 yes" in sections["image-use"]
    assert "joint figures 77 0.500 9.250 8.750 -0.250 to 9.375 not shown" in sections["image-use"]
    assert "benchmark metric method items joint 10 joint 20" in sections["benchmarks"]
    assert "pope f1 generate 9,000 0.375 0.875" in sections["benchmarks"]
    assert "text bits_per_byte generate 9,000 – 1.250" in sections["benchmarks"]
    assert "adversarial" not in sections["benchmarks"]
    assert "Read <this>." in sections["samples"] and "x < y & z" in sections["samples"]
    assert sections["samples"].count("· the same") == 1
    assert "adaptor 0.00, joint 0.50." in sections["mixture"]
    assert "joint, step 20, multimodal: 75% bubble" in sections["pipeline"]
    assert "joint multimodal 2 50% 25% 75%" in sections["pipeline"]
    assert "adaptor multimodal 10 0.500 4,096 52.0 2.0% 37.5% 40.0%" in sections["throughput"]
    assert "joint text 10 0.500 4,096 – 2.0% – –" in sections["throughput"]
    assert "phase adaptor joint imports 4.5 (9.2) – first step 2.0 (2.5) 1.0 (1.0)" in sections["startup"]
    assert "together 6.5 (11.8) 1.0 (1.0)" in sections["startup"]
    assert "joint dp_reshardable 3 98,000 190 0.500 4.000 2.000" in sections["checkpoints"]
    assert "pages" in sections["loss"] and "code" in sections["loss"]
    assert "steps 30 tokens 61,440 images 520" in sections[""]
    assert "skipped steps 1" in sections[""]
    assert "torch: 2.13.0" in sections[""] and "tiny<1>" in sections[""] and "0123456789" in sections[""]


@pytest.mark.parametrize(
    ("absent", "silent"),
    [
        ({"metrics", "image_use"}, {"loss", "mixture", "throughput", "image-use"}),
        ({"heldout", "samples", "benchmarks"}, {"heldout", "samples", "benchmarks"}),
        ({"timeline", "config", "startup"}, {"pipeline", "startup", ""}),
        ({"checkpoints"}, {"checkpoints"}),
        (set(WRITERS), {"", *SECTIONS}),
    ],
    ids=["metrics", "heldout", "timeline", "checkpoints", "everything"],
)
def test_a_part_without_its_file_says_so_and_the_others_stand(
    run: RunDirectory, absent: set[str], silent: set[str]
) -> None:
    page = Page(written(run, *(part for part in WRITERS if part not in absent)))
    assert [name for name in page.sections if name] == list(SECTIONS)
    assert {name for name, text in page.sections.items() if "Not there yet" in text} == silent


def test_a_long_run_makes_no_long_page(run: RunDirectory) -> None:
    lines = [
        json.dumps({**json.loads(line), "global_step": step, "step": step})
        for line in [json.dumps(vars(ROW))]
        for step in range(1, 20_001)
    ]
    run.metrics.write_text("\n".join(lines) + "\n")
    assert len(written(run)) < 1_000_000


def rows(run: RunDirectory) -> list[tables.Row]:
    write_steps(run)
    return list(read_rows(run.metrics))


def test_totals_add_up(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "LAST_STEPS", 3)
    totals = tables.totals(rows(run))
    assert (totals.num_steps, totals.num_tokens, totals.num_images) == (30, 30 * 2048, 20 * 26)
    assert (totals.num_skipped, totals.seconds) == (1, 15.0)
    assert totals.final_losses == {"text": 8.0 / 27, "multimodal": 8.0 / 28}


@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=40))
def test_the_gap_to_the_schedule_is_what_a_plain_loop_finds(steps: list[tuple[float, bool]]) -> None:
    metrics = [
        {
            "stage": "joint",
            "global_step": n,
            "text_ratio": ratio,
            "text_share": float(text),
        }
        for n, (ratio, text) in enumerate(steps, start=1)
    ]
    (ratio,) = tables.text_ratios(metrics)
    gaps = [
        abs(sum(text for _, text in steps[:n]) - sum(share for share, _ in steps[:n]))
        for n in range(1, len(steps) + 1)
    ]
    assert ratio.largest_gap == pytest.approx(max(gaps))
    assert ratio.realised_cumulative[-1] == pytest.approx(sum(text for _, text in steps) / len(steps))
