"""Sequence numbers that are never reused."""

import threading
import time

from producers.sequence import Sequence


def test_numbers_count_up_by_one():
    sequence = Sequence()
    first = sequence.next()
    assert [sequence.next() for _ in range(3)] == [first + 1, first + 2, first + 3]


def test_a_restart_begins_above_everything_of_the_run_before(monkeypatch):
    monkeypatch.setattr(time, "time", lambda: 1_795_400_914.9)
    before = Sequence()
    monkeypatch.setattr(time, "time", lambda: 1_795_400_915.0)
    assert Sequence().next() == before.next() + 2**20


def test_a_clock_that_went_back_repeats_no_number(monkeypatch):
    monkeypatch.setattr(time, "time", lambda: 1_795_400_914.0)
    used = Sequence().next()
    monkeypatch.setattr(time, "time", lambda: 1_500_000_000.0)
    assert Sequence(after=used).next() == used + 1


def test_numbers_stay_exact_in_lua_and_json_for_centuries(monkeypatch):
    monkeypatch.setattr(time, "time", lambda: 253 * 365.25 * 86400)  # the year 2223
    number = Sequence().next()
    assert number < 2**53
    assert int(float(number)) == number


def test_threads_share_no_number():
    sequence, numbers = Sequence(), []
    threads = [threading.Thread(target=lambda: numbers.extend([sequence.next() for _ in range(500)])) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(numbers) == list(range(min(numbers), min(numbers) + 2000))
