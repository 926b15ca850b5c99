"""The joint stage of the 7B on 8 to 4096 A100, simulated: with the batch growing as the ranks do, and with the paper's.

Weak scaling keeps the setting that is best on 512; strong scaling plans anew for every number of ranks.
"""

from dataclasses import dataclass

from benchmarks.seven_b_variations import Variation, plan_all
from megatron_vl.config.plan import SearchConfig
from megatron_vl.planning.forecast import Forecast

RANKS = (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
PER_NODE = 8
ROWS, ROWS_AT = 2304, 512  # the paper's batch and ranks
FEWEST_STRONG = 32  # below that a step takes more than a minute


@dataclass(frozen=True, kw_only=True)
class Scaled:
    num_ranks: int
    num_rows: int
    forecast: Forecast


def weak() -> list[Scaled]:
    """Rows in proportion to ranks: 4.5 each, as in the paper."""
    best = Variation(name="best").plan()
    if best is None:
        raise RuntimeError("nothing fits the paper's own cluster")
    setting = best.setting
    kept = SearchConfig(
        tensor_size=setting.topology.tensor_size,
        pipeline_size=setting.topology.pipeline_size,
        virtual_size=setting.topology.virtual_size,
        micro_batch_size=setting.micro_batch_size,
        vision_placement=setting.vision_placement,
        layout=setting.layout,
    )
    return _planned({ranks: ROWS * ranks // ROWS_AT for ranks in RANKS}, kept)


def strong() -> list[Scaled]:
    """The paper's batch on any number of ranks."""
    return _planned({ranks: ROWS for ranks in RANKS if ranks >= FEWEST_STRONG}, SearchConfig())


def _planned(rows: dict[int, int], kept: SearchConfig) -> list[Scaled]:
    """By ranks; a number of ranks on which nothing fits is left out."""
    variations = [
        Variation(
            name=str(ranks),
            overrides=(f"cluster.num_nodes={ranks // PER_NODE}", f"stage.joint.global_batch_size={batch}"),
            kept=kept,
        )
        for ranks, batch in rows.items()
    ]
    planned = zip(rows.items(), plan_all(variations), strict=True)
    return [Scaled(num_ranks=ranks, num_rows=batch, forecast=one) for (ranks, batch), one in planned if one]
