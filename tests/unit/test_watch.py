"""Who is silent and who stands still, judged by a clock that the test winds."""

from dataclasses import replace

from megatron_vl.device.trail import Trail
from megatron_vl.train.watch import LEFT, Beat, Watch

HANG = 10.0


def beat(
    number: int, moves: int = 0, phase: str = "forward", waits: bool = False, starting: bool = False
) -> Beat:
    return Beat(
        host="n1",
        pid=7,
        number=number,
        moves=moves,
        phase=phase,
        waits=waits,
        starting=starting,
        place=f"step 3, {phase}",
    )


def test_a_rank_is_silent_from_its_last_new_beat() -> None:
    watch = Watch(HANG)
    for second in range(30):
        watch.hear(0, beat(second), second)
        watch.hear(
            1, beat(min(second, 5), phase="backward"), second
        )  # the store goes on telling its last one
        assert (watch.silence(second) is not None) == (second > 15)
    verdict = watch.silence(29)
    assert verdict is not None
    assert verdict.startswith(
        "nothing was heard for 24 s from rank 1 (process 7 on n1, last at step 3, backward)"
    )
    assert "there still: rank 0 (process 7 on n1, last at step 3, forward)" in verdict


def test_ranks_that_live_and_do_not_move_stand_still() -> None:
    watch = Watch(HANG)
    for second in range(30):
        moves = min(second, 5)
        watch.hear(0, beat(second, moves + 1, phase="agreement", waits=True), second)
        watch.hear(1, beat(second, moves, phase="reading data"), second)
        watch.hear(2, beat(second, moves + 2, phase="forward"), second)
        assert watch.silence(second) is None
        assert (watch.standstill(second) is not None) == (second > 15)
    verdict = watch.standstill(29)
    assert verdict is not None
    at_work, waiting = verdict.split("; waiting for others: ")
    assert at_work.index("rank 1 (") < at_work.index("rank 2 (")
    assert "reading data" in at_work and "rank 0" not in at_work
    assert waiting == "rank 0 (process 7 on n1, last at step 3, agreement)"


def test_one_rank_that_moves_is_progress() -> None:
    watch = Watch(HANG)
    for second in range(50):
        watch.hear(0, beat(second, moves=second), second)
        watch.hear(1, beat(second, moves=3, waits=True), second)
    assert watch.standstill(49) is None


def test_a_start_may_take_longer_and_a_rank_may_leave() -> None:
    watch = Watch(HANG)
    for second in range(50):
        watch.hear(0, beat(second), second)
        watch.hear(1, beat(second, starting=True), second)
    assert watch.standstill(49) is None
    watch.hear(1, beat(50, phase=LEFT), 50)
    watch.hear(0, beat(100), 100)
    assert watch.silence(100) is None
    assert watch.standstill(100) is not None  # rank 0 alone is left


def test_a_watch_that_was_stopped_itself_begins_anew() -> None:
    """All ranks of a suspended job miss an hour."""
    watch = Watch(HANG)
    watch.hear(0, beat(1), 0.0)
    watch.forgive(3600.0)
    assert watch.silence(3605.0) is None and watch.standstill(3605.0) is None
    assert watch.silence(3611.0) is not None


def test_many_silent_ranks_are_counted() -> None:
    watch = Watch(HANG)
    for rank in range(100):
        watch.hear(rank, beat(1), 0.0)
    verdict = watch.silence(20.0)
    assert verdict is not None and "and 92 more ranks" in verdict and len(verdict) < 1000


def test_a_beat_comes_back_from_the_store_and_tells_the_last_mark() -> None:
    trail = Trail()
    trail.begin_stage("joint")
    trail.begin_step(17)
    trail.at("forward", 3)
    trail.at("forward-recv", waits=True)
    told = Beat.of(trail, host="n1", pid=7, number=1)
    assert told.place == "stage joint, step 17, forward-recv" and told.waits and told.moves == 3
    trail.at("backward", 3)
    assert str(trail) == "stage joint, step 17, backward 3"
    assert Beat.from_json(told.to_json().encode()) == told
    assert replace(told, number=2) != told
