"""Garbage goes when a step says so, and by itself while something else is measured."""

import gc
import weakref

from megatron_vl.device.garbage import Collector


class Node:
    def __init__(self) -> None:
        self.itself = self


def garbage() -> weakref.ref[Node]:
    return weakref.ref(Node())


def many() -> None:
    """Enough new objects for automatic collections."""
    for _ in range(20):
        [[] for _ in range(2000)]


def test_collections_come_every_so_many_steps_and_not_between() -> None:
    assert gc.isenabled()
    with Collector(every=3) as collector:
        collector.settle()
        gone_at = []
        for step in range(1, 7):
            left = garbage()
            many()
            collector.collect_if_due(step)
            gone_at += [step] if left() is None else []
        assert gone_at == [3, 6]
    assert gc.isenabled()


def test_what_is_used_no_longer_is_let_go_of_before_the_next_start() -> None:
    """The model of a stage that has ended, whose place the next one's takes."""
    with Collector(every=1) as collector:
        model = Node()
        left = weakref.ref(model)
        collector.settle()
        del model
        collector.let_go()
        assert left() is None


def test_what_stood_at_the_start_is_spared_until_the_next_start() -> None:
    with Collector(every=1) as collector:
        stays = Node()
        seen = weakref.ref(stays)
        collector.settle()
        del stays
        collector.collect_if_due(1)
        assert seen() is not None
        collector.settle()
        assert seen() is None
    assert gc.get_freeze_count() == 0


def test_evaluation_collects_by_itself() -> None:
    with Collector(every=1000) as collector:
        with collector.automatic():
            left = garbage()
            many()
            assert left() is None
        assert not gc.isenabled()
