"""Batches by size and by age; the clock is an argument."""

import pytest

from workers.batching import Batcher


@pytest.fixture
def batcher():
    return Batcher[str](max_batch=3, wait_s=0.5)


def test_nothing_waits_at_first(batcher):
    assert (len(batcher), batcher.members(), batcher.wait_s(10.0)) == (0, [], None)
    assert batcher.take(10.0) == batcher.drain() == []


def test_a_full_batch_is_due_at_once_and_the_rest_waits_its_turn(batcher):
    for item in "abcd":
        batcher.add(item, 10.0)
    assert batcher.wait_s(10.0) == 0.0
    assert batcher.take(10.0) == ["a", "b", "c"]
    assert batcher.wait_s(10.0) == pytest.approx(0.5)
    assert batcher.take(10.0) == []
    assert batcher.members() == ["d"]


def test_a_batch_is_due_when_its_oldest_member_has_waited_long_enough(batcher):
    batcher.add("a", 10.0)
    batcher.add("b", 10.4)
    assert batcher.wait_s(10.4) == pytest.approx(0.1)
    assert batcher.take(10.49) == []
    assert batcher.take(10.5) == ["a", "b"]
    assert len(batcher) == 0


def test_a_late_look_is_not_negative(batcher):
    batcher.add("a", 10.0)
    assert batcher.wait_s(99.0) == 0.0


def test_without_waiting_everything_is_due(batcher):
    eager = Batcher[str](max_batch=3, wait_s=0.0)
    eager.add("a", 10.0)
    assert eager.take(10.0) == ["a"]


def test_what_is_put_back_comes_first_and_in_order(batcher):
    for item in "abcde":
        batcher.add(item, 10.0)
    batch = batcher.take(10.0)
    batcher.put_back(batch, 10.1)
    assert batcher.members() == ["a", "b", "c", "d", "e"]
    assert batcher.take(10.1) == ["a", "b", "c"]


def test_what_is_put_back_waits_anew(batcher):
    batcher.add("a", 10.0)
    batcher.put_back(batcher.take(10.5), 10.5)
    assert batcher.wait_s(10.5) == pytest.approx(0.5)


def test_draining_gives_everything_in_batches_no_larger_than_others(batcher):
    for item in "abcdefg":
        batcher.add(item, 10.0)
    assert [batcher.drain() for _ in range(4)] == [["a", "b", "c"], ["d", "e", "f"], ["g"], []]


def test_a_deadline_closes_a_batch_before_its_time(batcher):
    batcher.add("a", 10.0)
    batcher.add("b", 10.1, close_by_s=10.2)
    assert batcher.wait_s(10.1) == pytest.approx(0.1)
    assert batcher.take(10.2) == ["a", "b"]


def test_a_far_deadline_delays_no_batch(batcher):
    batcher.add("a", 10.0, close_by_s=99.0)
    assert batcher.take(10.0 + batcher.wait_s(10.0)) == ["a"]
