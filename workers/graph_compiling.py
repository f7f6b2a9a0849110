"""Networks compiled beside the judging, which meanwhile goes on with them as they are."""

import logging
import queue
import threading
from collections.abc import Callable

import torch

from workers.graphs import Captures, Compute, Pause

logger = logging.getLogger(__name__)

# Each capacity of each structure is compiled for itself; beyond the limit the compiler would give up without a word.
_RECOMPILATIONS = 4096


class GraphCompiler:
    """One thread that compiles what it is asked for and puts it to use between two batches.

    The first failure is logged and ends the compiling: everything stays on what works.

    Args:
        pause: see `Captures.adopt`.
    """

    def __init__(self, pause: Pause) -> None:
        self._pause = pause
        self._asked: queue.SimpleQueue[tuple[Captures, Callable[[], Compute]] | None] = queue.SimpleQueue()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._work, name="compiler", daemon=True)
        self._thread.start()

    def ask(self, captures: Captures, compute: Callable[[], Compute]) -> None:
        """Let a compiled form of what `compute` returns take the place of what is captured."""
        self._asked.put((captures, compute))

    def end(self, timeout_s: float | None = 5.0) -> None:
        """Take nothing new; a compilation under way is waited for as long as said."""
        self._ended.set()
        self._asked.put(None)
        self._thread.join(timeout_s)

    def _work(self) -> None:
        while (asked := self._asked.get()) is not None:
            if self._ended.is_set():
                continue
            try:
                self._compile(*asked)
            except Exception as error:  # the compiler's errors are of any kind, and none may cost a frame
                logger.warning("networks are not compiled, judging goes on without: %s", error)
                self._ended.set()

    def _compile(self, captures: Captures, compute: Callable[[], Compute]) -> None:
        import torch._dynamo.config as limits

        limits.recompile_limit = limits.accumulated_recompile_limit = _RECOMPILATIONS
        with torch.no_grad():
            captures.adopt(torch.compile(compute(), dynamic=False), self._pause)
