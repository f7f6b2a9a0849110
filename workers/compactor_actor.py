"""The compactor as a Ray actor: a thread that works in rounds, at low priority, outside the serving path."""

import logging
import os
import threading

from workers.places import Places
from workers.settings import ResultsSettings

NAME = "compactor"
DRAIN_S = 30.0  # above the limit of a last round
_NICENESS = 10

logger = logging.getLogger(__name__)


class CompactorActor:
    """Works from the moment it is made; made by `proctor up`, started anew by Ray when it dies.

    Args:
        places: server and stores.
        settings: pauses and retention.
    """

    def __init__(self, places: Places, settings: ResultsSettings) -> None:
        # here, not above: whoever only starts the actor shall not load deltalake
        from workers.compactor_loop import CompactorLoop

        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
        os.nice(_NICENESS)  # frames go first
        self._loop = CompactorLoop(places.results_uri, places.connect, settings)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="compactor", daemon=True)
        self._thread.start()

    def pid(self) -> int:
        """Process id; answers as soon as the compactor works."""
        return os.getpid()

    def drain(self) -> None:
        """Do a last round and end; called after the replicas have written their last segments."""
        self._stop.set()
        self._thread.join(DRAIN_S)

    def _run(self) -> None:
        try:
            self._loop.run(self._stop)
        except BaseException:  # the thread's outer edge: Ray starts the actor anew, and nothing was lost
            logger.exception("the compactor failed")
            os._exit(1)
