"""The guard: a small process that ends what a killed supervisor leaves behind.

Most of Ray dies with its owner, but its agents wait a minute for a GCS that is gone. The supervisor names its
processes to the guard; when the supervisor ends, however it ends, the guard ends those that are left.
"""

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator

import psutil

_GRACE_S = 3.0

Watch = Callable[[Iterable[psutil.Process]], None]


@contextlib.contextmanager
def guarded() -> Iterator[Watch]:
    """Yield a function that takes processes which must not outlive this one."""
    guard = subprocess.Popen(
        [sys.executable, "-P", "-m", "cluster.guard"],
        stdin=subprocess.PIPE,
        start_new_session=True,  # Ctrl-C is not for the guard
    )
    told = guard.stdin
    assert told is not None

    def watch(processes: Iterable[psutil.Process]) -> None:
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                # pid and start together name a process, also after the pid has been given to another one
                told.write(f"{process.pid} {process.create_time()!r}\n".encode())
        told.flush()

    try:
        yield watch
    finally:
        told.close()
        guard.wait()


def main() -> None:
    """Read processes until the end of standard input, which is the supervisor's end; then clear up."""
    named = []
    for line in sys.stdin:
        pid, started = line.split()
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(int(pid))
            if process.create_time() == float(started) and process.pid != os.getpid():
                named.append(process)
    _, alive = psutil.wait_procs(named, timeout=_GRACE_S)
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


if __name__ == "__main__":
    main()
