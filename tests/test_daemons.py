"""Threads that end with their process: calls in order, errors to whoever asks, nothing held afterwards."""

import gc
import subprocess
import sys
import threading
import weakref

import pytest

from workers.daemons import Daemons


class Rows:
    """Something that is held or not."""


def fail(_: Rows) -> None:
    raise OSError("disk full")


@pytest.fixture
def daemons():
    made = Daemons(1, "test")
    yield made
    made.shutdown()


def test_calls_are_made_in_order_and_errors_raised_to_whoever_asks(daemons):
    results = [daemons.submit(int, "7"), daemons.submit(fail, Rows()), daemons.submit(int, "8")]
    assert (results[0].result(10), results[2].result(10)) == (7, 8)
    with pytest.raises(OSError, match="disk full"):
        results[1].result(10)


def test_what_a_failed_call_held_is_let_go_of_at_once(daemons):
    rows = Rows()
    watched = weakref.ref(rows)
    gc.disable()  # a write that fails again and again would fill the memory before the collector comes
    try:
        result = daemons.submit(fail, rows)
        assert isinstance(result.exception(10), OSError)
        del rows, result
        daemons.submit(int).result(10)
        assert watched() is None
    finally:
        gc.enable()


def test_nothing_is_taken_that_nobody_would_do():
    ended = Daemons(1, "test")
    ended.shutdown()
    with pytest.raises(RuntimeError, match="these threads were ended"):
        ended.submit(int)
    assert not any(thread.name.startswith("test-") for thread in threading.enumerate())


def test_a_call_that_never_ends_does_not_keep_the_process():
    program = "import threading; from workers.daemons import Daemons; Daemons(1, 'x').submit(threading.Event().wait)"
    assert subprocess.run([sys.executable, "-c", program], timeout=60, check=False).returncode == 0
