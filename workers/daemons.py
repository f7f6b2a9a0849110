"""Threads that do not keep a process from ending, unlike those of `concurrent.futures`.

A call that a device or a disk never answers would otherwise be waited for at the process's end.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from queue import SimpleQueue
from threading import Thread
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class Daemons:
    """Makes calls in threads of its own, in the order in which they are given.

    Args:
        count: how many threads.
        name: of the threads, a number follows.
    """

    def __init__(self, count: int, name: str) -> None:
        self._given: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = SimpleQueue()
        self._threads = [Thread(target=self._work, name=f"{name}-{number}", daemon=True) for number in range(count)]
        self._ended = False
        for thread in self._threads:
            thread.start()

    def submit(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Have a call made; whatever it raises is raised to whoever asks for its result.

        Raises:
            RuntimeError: the threads were ended.
        """
        if self._ended:
            raise RuntimeError("these threads were ended: nobody would make the call")
        result: Future[T] = Future()
        self._given.put((result, partial(call, *args, **kwargs)))
        return result

    def shutdown(self, *, wait: bool = True) -> None:
        """End the threads once everything given is done, and wait for that if asked to."""
        self._ended = True
        for _ in self._threads:
            self._given.put(None)
        for thread in self._threads if wait else ():
            thread.join()

    def _work(self) -> None:
        while (given := self._given.get()) is not None:
            result, call = given
            try:
                result.set_result(call())
            except BaseException as error:
                result.set_exception(error)
            # What they hold is not kept until the next call comes, nor, by way of the error's frames, by the error.
            del given, result, call
