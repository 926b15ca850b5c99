"""A node's planning process gives its ranks what a planner of their own would."""

import json
import os
import secrets
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_vl.config.errors import UserError
from megatron_vl.data.image_tokens import ImageTokens
from megatron_vl.data.index import SourceIndex
from megatron_vl.data.indexing import build_index
from megatron_vl.data.plan import Planner
from megatron_vl.data.plan_client import PlanClient, ServerSettings, plan_server
from megatron_vl.data.plan_state import merge_states
from megatron_vl.data.source_table import PlannedSource, open_table, source_table
from megatron_vl.data.storage.folder import DEFAULT_ACCESS
from tests.support.plans import MODALITIES, plan_settings
from tests.support.runs import wait_for
from tests.support.tiny_data import mixed_samples, text_rule, write_source, write_tokenizer

TOKENS = ImageTokens(tokens_per_image=4)
PLAN = plan_settings(
    sources={"pages": 1.0}, text_ratio=0.0, text_warmup_fraction=0.0, balance_lanes=2, flush_steps=3
)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> PlannedSource:
    folder = tmp_path_factory.mktemp("source")
    rule = text_rule(write_tokenizer(folder / "tokenizer.json"))
    write_source(folder, mixed_samples(40), max_samples=7)
    build_index(folder, rule, max_sample_bytes=100_000)
    table = source_table(SourceIndex.open(folder, rule, name="pages"), MODALITIES["pages"], TOKENS)
    return PlannedSource(
        name="pages",
        modality=table.modality,
        url=str(folder),
        access=DEFAULT_ACCESS,
        tokens_per_image=TOKENS.tokens_per_image,
        digest=table.digest,
    )


def server_settings(source: PlannedSource, **changes: object) -> ServerSettings:
    address = f"\0megatron-vl-test-{secrets.token_hex(8)}"
    settings = ServerSettings(address=address, dp_size=4, plan=PLAN, sources=(source,), state=None)
    return replace(settings, **changes)  # type: ignore[arg-type]


@contextmanager
def clients(settings: ServerSettings, ranks: range, first_step: int = 1) -> Iterator[list[PlanClient]]:
    with plan_server(settings):
        connected = [PlanClient(settings.address, rank, first_step) for rank in ranks]
        yield connected
        for client in connected:
            client.close()


def test_ranks_get_the_plan_that_they_would_make(source: PlannedSource) -> None:
    tables = {"pages": open_table(source)}
    own = [Planner(tables, PLAN, rank, 4) for rank in range(4)]
    with clients(server_settings(source), range(4)) as asked:
        for _ in range(5):
            assert [client.next() for client in asked] == [planner.next() for planner in own]
        assert [client.state_after(5) for client in asked] == [planner.state() for planner in own]
        [first, *_] = asked
        ahead = [first.next() for _ in range(6)]  # one rank is ahead of the others
        assert [plan.step for plan in ahead] == [6, 7, 8, 9, 10, 11]
        assert asked[1].next().digest == ahead[0].digest  # of the same group
        state = merge_states([client.state_after(5) for client in asked])
    resumed_at = server_settings(source, state=state)
    with clients(resumed_at, range(4), first_step=6) as resumed:
        assert [resumed[0].next() for _ in range(6)] == ahead
        early = PlanClient(resumed_at.address, 3, first_step=5)
        with pytest.raises(UserError, match="step 5 was planned long ago"):
            early.next()
        assert resumed[1].next().step == 6  # which that question did not disturb
        early.close()


def test_what_a_server_cannot_plan_reaches_the_rank_as_its_error(source: PlannedSource) -> None:
    plan = replace(PLAN, max_epochs={"pages": 1}, packing=False)
    with clients(server_settings(source, plan=plan), range(1)) as [client]:
        used_up = r"has used up its multimodal sources: .*max_epochs allows \{'pages': 1\}"
        with pytest.raises(UserError, match=used_up):
            list(iter(client.next, None))


def test_settings_survive_their_way_to_the_server(source: PlannedSource) -> None:
    state = Planner({"pages": open_table(source)}, PLAN).state()
    settings = server_settings(source, state=state)
    assert ServerSettings.from_json(json.loads(json.dumps(settings.to_json(), default=str))) == settings


def test_a_source_indexed_anew_meanwhile_is_refused(source: PlannedSource) -> None:
    with pytest.raises(UserError, match=r"data\.sources\.pages: .* was indexed anew"):
        open_table(replace(source, digest="another"))


def test_a_server_without_sources_says_why_and_the_rank_does_not_hang(
    source: PlannedSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("megatron_vl.data.plan_client.START_SECONDS", 3.0)
    settings = server_settings(replace(source, url=str(tmp_path / "gone")))
    with plan_server(settings):
        with pytest.raises(UserError, match="no process plans for this node"):
            PlanClient(settings.address, 0, 1)
        # It reports when it has started, which may take longer on a busy machine.
        wait_for(lambda: "gone" in capfd.readouterr().err, "the server's reason")


def test_a_server_that_ends_is_an_error_at_its_ranks(source: PlannedSource) -> None:
    settings = server_settings(source)
    with plan_server(settings):
        client = PlanClient(settings.address, 0, 1)
        client.next()
    with pytest.raises(UserError, match="the process that plans for this node has ended"):
        client.next()
    client.close()


def test_a_server_ends_with_whoever_started_it(source: PlannedSource) -> None:
    """Also when that process is killed, and cannot stop anything."""
    settings = server_settings(source)
    command = [sys.executable, "-m", "megatron_vl.data.plan_server"]
    reading, writing = os.pipe()
    server = subprocess.Popen(command, stdin=reading)
    os.close(reading)
    os.write(writing, json.dumps(settings.to_json(), default=str).encode() + b"\n")
    PlanClient(settings.address, 0, 1).close()
    os.close(writing)  # as the system does it for a killed process
    assert server.wait(timeout=20) == 0


def test_the_server_imports_no_torch() -> None:
    code = (
        "import sys, megatron_vl.data.plan_server; "
        "print([name for name in ('torch', 'PIL', 'webdataset') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
