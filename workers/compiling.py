"""Compiles beside the work, one thing at a time, and never in its way."""

import contextlib
import fcntl
import gc
import itertools
import logging
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Hashable, Iterator
from pathlib import Path

logger = logging.getLogger(__name__)

# Seconds. A thread that computes by many small operations asks for the interpreter's lock after each, and beside one
# that compiles it would wait 5 ms every time: a batch of 18 ms took 2 s.
_TURN_S = 2e-5

_NICENESS, _PATIENCE_S = 19, 5.0
_LAST = 1 << 30
_NEVER = 2**31 - 1


def cache_folder() -> Path:
    """Where compiled code is kept for later starts and for the other replicas of this machine."""
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir  # most of a second, of a compiler's time

    chosen = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    if chosen and chosen != default_cache_dir():  # which PyTorch puts there itself; it is gone after a boot
        return Path(chosen)
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "proctor" / "compiled"


def take_short_turns() -> None:
    """Let this process's threads take turns at the interpreter so often that none waits long for one that compiles."""
    sys.setswitchinterval(_TURN_S)


class BackgroundCompiler:
    """A thread that compiles what it is given, in order; what cannot be compiled is left as it is.

    Args:
        keeps: what it compiles is never given up, so what is in memory after a task is left out of later garbage
            collections.
    """

    def __init__(self, keeps: bool = False) -> None:
        self._keeps = keeps
        self._tasks: queue.PriorityQueue[tuple[int, int, Callable[[], None] | None]] = queue.PriorityQueue()
        self._numbers = itertools.count()
        self._known: set[Hashable] = set()
        self._reasons: set[str] = set()
        self._open = 0
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="compiler", daemon=True)
        self._thread.start()

    def add(self, key: Hashable | None, task: Callable[[], None], rank: int = 0) -> None:
        """Have a task done that compiles something and puts it to use.

        Args:
            key: nothing is done again for a key; keys are remembered. None is no key.
            task: does both.
            rank: tasks of a lower one come first.
        """
        with self._changed:
            if self._closed or key in self._known:
                return
            if key is not None:
                self._known.add(key)
            self._open += 1
        self._tasks.put((rank, next(self._numbers), task))

    def wait(self, timeout_s: float) -> bool:
        """Wait until nothing is left to compile; False if that takes longer."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._open, timeout_s)

    def close(self) -> None:
        """Compile nothing more; what is being compiled is waited for, a few seconds."""
        with self._changed:
            self._closed = True
        self._tasks.put((_LAST, next(self._numbers), None))
        self._thread.join(_PATIENCE_S)

    def _run(self) -> None:
        # Linux has niceness by thread; the compiler that is started from here has it too.
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
        while (task := self._tasks.get()[-1]) is not None:
            if not self._closed:
                self._compile(task)
            del task  # what it compiled for may be gone before the next one comes
            with self._changed:
                self._open -= 1
                self._changed.notify_all()

    def _compile(self, task: Callable[[], None]) -> None:
        started = time.monotonic()
        try:
            with _alone_on_this_machine(), _short_collections():
                task()
        except Exception as error:  # a compiler's outer edge: it is computed as it is instead
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            if reason not in self._reasons:
                logger.warning("not compiled, which is slower but no less right: %s", reason)
            self._reasons.add(reason)
        else:
            logger.info("compiled in %.1f s", time.monotonic() - started)
            if self._keeps:
                gc.freeze()


@contextlib.contextmanager
def _alone_on_this_machine() -> Iterator[None]:
    """Hold the cache's lock: of replicas that start together the first compiles, the others find its results."""
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _short_collections() -> Iterator[None]:
    """Put off the garbage collector's full passes, for each of which all threads stand still, 0.3 s while a compiler's
    objects are there, until those are gone.
    """
    young, middle, old = gc.get_threshold()
    gc.set_threshold(young, middle, _NEVER)
    try:
        yield
    finally:
        gc.collect()
        gc.set_threshold(young, middle, old)
