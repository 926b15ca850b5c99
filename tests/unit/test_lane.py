"""A lane's draws: a draw taken back leaves no trace."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_vl.data.deal import SourceDeal
from megatron_vl.data.lane import Draws, LaneRule
from megatron_vl.data.plan import Planner
from megatron_vl.data.types import MULTIMODAL, TEXT
from tests.support.plans import plan_settings, small_tables

SETTINGS = plan_settings()
TABLES = small_tables()
DEALS = {name: SourceDeal(table, SETTINGS.deal_settings(name)) for name, table in TABLES.items()}


@given(num_draws=st.integers(0, 60), modality=st.sampled_from([TEXT, MULTIMODAL]))
def test_a_draw_taken_back_leaves_no_trace(num_draws: int, modality: str) -> None:
    weights = {name: 1 + number for number, name in enumerate(TABLES) if TABLES[name].modality == modality}
    rule = LaneRule(
        stage="joint", modality=modality, deals=DEALS, weights=weights, max_epochs={}, packing=None
    )
    first = Planner(TABLES, SETTINGS).state().lanes[1]
    plain, undone = Draws(rule, first), Draws(rule, first)
    for _ in range(num_draws):
        assert plain.draw() == undone.draw()
    undone.draw()
    undone.undo()
    for name in ("credits", "cursors", "left_out"):
        assert getattr(undone, name) == getattr(plain, name)
    with pytest.raises(RuntimeError, match="no draw"):
        undone.undo()
