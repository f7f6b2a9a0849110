"""Keeps the engine's residents at the pointers: loads beside the loop, swaps between two batches."""

import logging
import threading
import time
from dataclasses import dataclass

from models.errors import ModelError
from workers.engine import Engine, Resident
from workers.errors import NoModel, StreamUnavailable
from workers.pointers import CURRENT, Pointers

logger = logging.getLogger(__name__)

_RETRY_S = 10.0


@dataclass(frozen=True)
class _Failure:
    """A version that could not be loaded, why, and when to try again."""

    version: str
    reason: str
    retry_at: float


class Residency:
    """Follows the pointers in a thread of its own.

    Args:
        engine: builds versions and takes them into service.
        pointers: which version each product shall have.
        poll_s: how often they are looked up.
    """

    def __init__(self, engine: Engine, pointers: Pointers, poll_s: float) -> None:
        self._engine, self._pointers, self._poll_s = engine, pointers, poll_s
        self._failures: dict[str, _Failure] = {}
        self._loading = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="residency", daemon=True)

    def start(self) -> None:
        """Load every product's current version, then follow in the background.

        Raises:
            StreamUnavailable: Redis does not answer.
        """
        self.follow()
        self._thread.start()

    def stop(self) -> None:
        """Stop following."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def follow(self) -> None:
        """Bring the engine to the pointers, now.

        A version that cannot be loaded leaves the old one in service and is tried again later.
        """
        for product, version in self._pointers.current().items():
            if not self._is_served(product, version):
                self._bring(product)

    def require(self, product: str) -> Resident:
        """The version in service for a product; one that was just promoted is loaded first.

        Raises:
            NoModel: the product has none, with the reason.
            StreamUnavailable: Redis does not answer.
        """
        resident = self._engine.resident(product)
        if resident is None and product not in self._failures and CURRENT in self._pointers.of(product):
            self._bring(product)
            resident = self._engine.resident(product)
        if resident is None:
            failure = self._failures.get(product)
            raise NoModel(
                f"version {failure.version} cannot be loaded: {failure.reason}"
                if failure
                else "no model for this product"
            )
        return resident

    def _is_served(self, product: str, version: str) -> bool:
        resident = self._engine.resident(product)
        return resident is not None and resident.card.version == version

    def _bring(self, product: str) -> None:
        """Load the current version of a product and put it into service, one at a time."""
        with self._loading:
            version = self._pointers.of(product).get(CURRENT)  # looked up again: the lock may have been long in coming
            if version is None or self._is_served(product, version):
                return
            failure = self._failures.get(product)
            if failure and failure.version == version and time.monotonic() < failure.retry_at:
                return
            try:
                self._engine.install(self._engine.build(product, version))
                self._failures.pop(product, None)
            except ModelError as error:
                self._note_failure(product, version, str(error))
            except Exception as error:  # the version's outer edge: the others are followed all the same
                logger.exception("%s: loading version %s failed", product, version)
                self._note_failure(product, version, f"{type(error).__name__}: {error}".splitlines()[0])

    def _note_failure(self, product: str, version: str, reason: str) -> None:
        before = self._failures.get(product)
        if before is None or (before.version, before.reason) != (version, reason):
            logger.error("%s: version %s cannot be put into service: %s", product, version, reason)
        self._failures[product] = _Failure(version, reason, time.monotonic() + _RETRY_S)

    def _run(self) -> None:
        while not self._stop.wait(self._poll_s):
            try:
                self.follow()
            except StreamUnavailable as error:
                logger.warning("cannot look up versions: %s", error)
            except Exception:  # the thread's outer edge: the versions in service stay
                logger.exception("looking up versions failed")
