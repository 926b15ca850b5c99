"""Shuffles are permutations, never change between versions, and depend on the whole key."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from megatron_vl.data.hashing import permutation, random_words, stream_key

KEYS = st.integers(0, 2**64 - 1)


def test_random_words_are_those_of_splitmix64() -> None:
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    assert random_words(1234567, 4).tolist() == published  # the generator's usual reference vector


def test_orders_and_keys_never_change() -> None:
    """A changed value here breaks the resume of every run: it needs a new version of the saved plan."""
    assert permutation(1, 8).tolist() == [4, 3, 7, 0, 1, 5, 6, 2]
    assert stream_key(1234, "joint", 0) == 8494726441245248975


@given(key=KEYS, num=st.integers(0, 500))
def test_permutation_holds_each_number_once(key: int, num: int) -> None:
    assert sorted(permutation(key, num).tolist()) == list(range(num))


@given(key=KEYS)
def test_neighbouring_keys_give_unrelated_orders(key: int) -> None:
    here, there = permutation(key, 1000), permutation((key + 1) % 2**64, 1000)
    assert (here == there).sum() < 20  # 1 is expected by chance
    assert abs(np.corrcoef(here, there)[0, 1]) < 0.2


@given(labels=st.lists(st.one_of(st.integers(), st.text()), max_size=4))
def test_stream_key_depends_on_every_label(labels: list[int | str]) -> None:
    assert 0 <= stream_key(*labels) < 2**64
    assert stream_key(*labels) != stream_key(*labels, 0)
    assert stream_key(1, 23) != stream_key(12, 3)
