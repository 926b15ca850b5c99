"""How the optimizer is stored follows from what gathering it would cost."""

import pytest

from megatron_vl.checkpoint.sharding import (
    DP_RESHARDABLE,
    FULLY_RESHARDABLE,
    MAX_GATHERED_BYTES,
    choose_sharding,
)
from megatron_vl.config.errors import UserError

LIMIT = MAX_GATHERED_BYTES // 12  # AdamW's two moments and the parameter, in fp32


@pytest.mark.parametrize(
    ("wanted", "num_trained", "bare_ranks", "chosen"),
    [
        ("auto", LIMIT, [], FULLY_RESHARDABLE),
        ("auto", LIMIT + 1, [], DP_RESHARDABLE),
        ("auto", LIMIT + 1, [3], FULLY_RESHARDABLE),
        (FULLY_RESHARDABLE, 100 * LIMIT, [], FULLY_RESHARDABLE),
        (DP_RESHARDABLE, 1, [], DP_RESHARDABLE),
    ],
)
def test_what_is_wanted_or_what_gathering_costs(
    wanted: str, num_trained: int, bare_ranks: list[int], chosen: str
) -> None:
    assert choose_sharding(wanted, num_trained, bare_ranks) == chosen


def test_ranks_without_a_parameter_are_named() -> None:
    with pytest.raises(UserError, match=r"checkpoint.optimizer_sharding=dp_reshardable: ranks \[6, 7\]"):
        choose_sharding(DP_RESHARDABLE, 1, [6, 7])


@pytest.mark.parametrize(("num_trained", "chosen"), [(21e6, FULLY_RESHARDABLE), (1.7e9, DP_RESHARDABLE)])
def test_the_stages_of_the_7b(num_trained: float, chosen: str) -> None:
    """Stage 1 trains the adaptor; of stage 2, a rank at TP 2 x PP 2 trains a quarter of 6.9 billion."""
    assert choose_sharding("auto", int(num_trained), []) == chosen
