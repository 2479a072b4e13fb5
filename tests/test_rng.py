"""Random states that a second pass goes back to: NumPy's and Python's are read and written only where somebody has drawn."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from fastpost.rng import RandomState, seed_of, stream_seed


def drawn(normals: int, uniforms: int) -> list[float]:
    """NumPy makes normals two at a time: an odd number leaves one that lies outside of its words."""
    own = [random.random(), torch.rand(()).item()]
    return [*(np.random.normal() for _ in range(normals)), *(np.random.random() for _ in range(uniforms)), *own]


@pytest.mark.parametrize("before", range(4))
@pytest.mark.parametrize("normals", range(4))
@pytest.mark.parametrize("uniforms", range(2))
def test_the_second_pass_draws_what_the_first_drew(before: int, normals: int, uniforms: int) -> None:
    np.random.seed(3)
    drawn(before, 0)
    for _ in range(3):  # states that were read before, and new ones
        state = RandomState()
        first = drawn(normals, uniforms)
        after = RandomState()
        state.put()
        assert drawn(normals, uniforms) == first
        after.put()
        following = drawn(2, 1)
        after.put()
        assert drawn(2, 1) == following
        after.put()


def test_seeds_of_runs_have_no_step_in_common() -> None:
    keys = {seed_of(seed, step, part) for seed in range(-4, 8) for step in range(500) for part in range(20)}
    assert len(keys) == 12 * 500 * 20
    assert all(0 <= key < 2**64 for key in keys)
    assert [seed_of(seed, 0) for seed in (0, 7, -1)] == [0, 7, 2**64 - 1]
    assert all(seed_of(kind(7), kind(3), kind(2)) == seed_of(7, 3, 2) for kind in (np.int32, np.int64, np.uint64))


def test_a_second_pass_that_draws_less_leaves_what_the_first_left() -> None:
    np.random.seed(3)
    np.random.normal()  # a second normal is kept
    state = RandomState()
    np.random.normal()
    after = RandomState()
    expected = drawn(3, 1)
    state.put()
    after.put()
    assert drawn(3, 1) == expected


def test_another_generator_of_numpys() -> None:
    plain = np.random.get_bit_generator()
    np.random.set_bit_generator(np.random.PCG64(5))
    try:
        state = RandomState()
        first = drawn(1, 1)
        state.put()
        assert drawn(1, 1) == first
    finally:
        np.random.set_bit_generator(plain)


def test_nothing_is_read_twice_where_nobody_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    np.random.seed(3)
    reads, writes = [], []
    plain = np.random.get_state, np.random.set_state
    monkeypatch.setattr(np.random, "get_state", lambda: reads.append(1) or plain[0]())
    monkeypatch.setattr(np.random, "set_state", lambda state: writes.append(1) or plain[1](state))
    for _ in range(3):
        RandomState().put()
    assert (len(reads), len(writes)) == (1, 0)
    state = RandomState()
    np.random.random()
    state.put()
    assert (len(reads), len(writes)) == (1, 1)


@pytest.mark.parametrize("before", range(3))
@pytest.mark.parametrize("normals", range(4))
@pytest.mark.parametrize("uniforms", range(2))
def test_pythons_normals_come_two_at_a_time_as_well(before: int, normals: int, uniforms: int) -> None:
    def drawn() -> list[float]:
        return [*(random.gauss(0, 1) for _ in range(normals)), *(random.random() for _ in range(uniforms))]

    random.seed(3)
    for _ in range(before):
        random.gauss(0, 1)
    for _ in range(3):
        state, whole = RandomState(), random.getstate()
        first = drawn()
        after, end = RandomState(), random.getstate()
        state.put()
        assert random.getstate() == whole
        assert drawn() == first
        after.put()
        assert random.getstate() == end


def test_a_normal_that_is_put_back_beside_the_same_words_is_seen() -> None:
    random.seed(3)
    plain = RandomState()
    version, words, _ = random.getstate()
    random.setstate((version, words, 0.5))
    waiting = RandomState()
    plain.put()
    assert random.getstate() == (version, words, None)
    waiting.put()
    assert random.getstate() == (version, words, 0.5)


def test_pythons_state_is_not_read_twice_where_nobody_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    random.seed(3)
    writes: list[int] = []
    plain = random.setstate
    monkeypatch.setattr(random, "setstate", lambda state: writes.append(1) or plain(state))
    states = [RandomState() for _ in range(3)]
    for state in states:
        state.put()
    assert not writes
    assert len({id(state._twisters[1][1]) for state in states}) == 1
    random.random()
    states[0].put()
    assert len(writes) == 1


def test_a_seed_makes_words_that_were_read_before_the_generators_again() -> None:
    random.seed(3)
    state = RandomState()
    first = random.random()
    random.seed(4)
    RandomState()
    state.put()
    assert random.random() == first


def test_streams_of_other_numbers_have_other_seeds() -> None:
    names = [(seed, batch, k) for seed in (-1, 0, 1, 2**70) for batch in range(12) for k in range(120)]
    seeds = [stream_seed(*name) for name in names]
    assert len(set(seeds)) == len(names)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert stream_seed(0, 12) != stream_seed(0, 1, 2) != stream_seed(1, 0, 2)
