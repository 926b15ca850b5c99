"""Where a stage's plan stood every so many steps, as previews have found: a later look goes on from there.

run.dir/plan/joint-00000256.json.gz   the state after step 256 of the stage joint
"""

import gzip
import json
from pathlib import Path

from megatron_vl.data.plan_state import Fingerprint, PlanState

FOLDER = "plan"
MAX_BYTES = 1 << 30


class Bookmarks:
    """The bookmarks of one stage, one every `every` steps. Those of another plan are not read."""

    def __init__(self, run_dir: Path, stage: str, every: int, fingerprint: Fingerprint) -> None:
        self._folder, self._stage, self._every = run_dir / FOLDER, stage, every
        self._fingerprint = json.loads(json.dumps(dict(fingerprint)))

    def keep(self, state: PlanState) -> None:
        """Write a state that has all lanes, where it is due; atomic."""
        if state.step % self._every:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"{self._stage}-{state.step:08d}.json.gz"
        aside = path.with_suffix(".partial")
        aside.write_bytes(gzip.compress(json.dumps(state.to_json()).encode(), compresslevel=3))
        aside.replace(path)

    def newest_before(self, step: int) -> PlanState | None:
        """The last state before `step`, at most `every` steps ago if a preview has been there."""
        for path in sorted(self._folder.glob(f"{self._stage}-*.json.gz"), reverse=True):
            if int(path.name.removeprefix(f"{self._stage}-").removesuffix(".json.gz")) < step:
                state = self._read(path)
                if state is not None:
                    return state
        return None

    def _read(self, path: Path) -> PlanState | None:
        """None for a state of another plan, which will be written anew."""
        with gzip.open(path) as file:
            saved = json.loads(file.read(MAX_BYTES))
        return PlanState.from_json(saved) if saved["fingerprint"] == self._fingerprint else None
