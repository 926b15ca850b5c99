"""Layouts hold every layer once, as megatron-core's own parser sees it; sizes that do not divide are refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.transformer.enums import LayerType
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

from megatron_vl.config.errors import UserError
from megatron_vl.planning.layout import even_layout, parse_layout, resolve_layout
from megatron_vl.planning.topology import Topology, check_batch_sizes


def grid(pipeline_size: int, virtual_size: int = 1, data_size: int = 1) -> Topology:
    return Topology(
        world_size=pipeline_size * data_size, pipeline_size=pipeline_size, virtual_size=virtual_size
    )


@given(pipeline_size=st.integers(2, 8), virtual_size=st.integers(1, 4), extra=st.integers(0, 40))
def test_an_even_layout_holds_every_layer_once(pipeline_size: int, virtual_size: int, extra: int) -> None:
    topology = grid(pipeline_size, virtual_size)
    num_layers = topology.num_chunks + extra
    layout = even_layout(num_layers, topology)
    theirs = PipelineParallelLayerLayout(layout, pipeline_size)
    theirs.validate_layer_layout(num_layers, None)
    counts = [chunk.count("t") for chunk in parse_layout(layout)]
    assert max(counts) - min(counts) <= 1
    assert min(counts[0], counts[-1]) == min(counts) or extra == 0  # the ends have E and L besides


@given(counts=st.lists(st.integers(0, 5), min_size=2, max_size=6))
def test_a_layout_is_read_as_megatron_core_reads_it(counts: list[int]) -> None:
    chunks = [f"t*{count}" if count > 1 else "t" * count for count in counts]
    layout = "E" + "|".join(chunks) + ",L"
    theirs = PipelineParallelLayerLayout(layout, len(counts))
    expected = [stage[0].count(LayerType.decoder) for stage in theirs.layout]
    assert [chunk.count("t") for chunk in parse_layout(layout)] == expected == counts
    assert parse_layout(resolve_layout(layout, sum(counts), grid(len(counts)))) == parse_layout(layout)


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ("Ett|tL", "4 t"),
        ("Ett|tttL", "4 t"),
        ("tt|EttL", "one E first"),
        ("Ett|ttL|", "3 chunks"),
        ("Ett|xxL", "unknown x"),
    ],
)
def test_a_wrong_layout_is_refused(layout: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        resolve_layout(layout, 4, grid(2))
    assert f"parallel.layout={layout!r}" in str(error.value)


def test_fewer_layers_than_chunks_are_refused() -> None:
    with pytest.raises(UserError, match="num_layers=3"):
        resolve_layout(None, 3, grid(2, 2))


@pytest.mark.parametrize(
    ("global_batch", "micro_batch", "topology", "message"),
    [
        (10, 2, grid(1, data_size=4), "nearest: 8"),
        (2, 2, grid(2, 2), "1 microbatches"),
        (0, 1, grid(1), "global_batch_size=0"),
        (4, 0, grid(1), "micro_batch_size=0"),
    ],
)
def test_batches_that_do_not_divide_are_refused(
    global_batch: int, micro_batch: int, topology: Topology, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        check_batch_sizes(global_batch, micro_batch, topology, "joint")


def test_batches_that_divide_pass() -> None:
    check_batch_sizes(8, 2, grid(1, data_size=4), "joint")
    check_batch_sizes(6, 2, grid(2, 2), "joint")
