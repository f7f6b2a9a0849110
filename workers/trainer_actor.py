"""The trainer as a Ray actor: a thread that works off the queue, at low priority, outside the serving path."""

import logging
import os
import threading
from collections.abc import Mapping

from models.settings import TrainingSettings
from workers.places import Places

NAME = "trainer"
_NICENESS = 10

logger = logging.getLogger(__name__)


class TrainerActor:
    """Trains from the moment it is made; made by `proctor up`, started anew by Ray when it dies.

    Args:
        places: server and stores.
        settings: training settings of products that have none of their own.
        products: training settings by product.
    """

    def __init__(
        self,
        places: Places,
        settings: TrainingSettings,
        products: Mapping[str, TrainingSettings],
    ) -> None:
        # here, not above: whoever only starts the actor shall not load PyTorch
        from models.registry import Registry
        from workers.approvals import Approvals
        from workers.jobs import Jobs
        from workers.pointers import Pointers
        from workers.trainer import Trainer, TrainerStores

        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
        os.nice(_NICENESS)  # frames go first
        server = places.connect()
        registry = Registry(places.registry_uri)
        stores = TrainerStores(
            Jobs(server),
            registry,
            Approvals(places.datasets_uri, places.results_uri),
            Pointers(server, registry),
        )
        self._trainer = Trainer(stores, lambda product: products.get(product, settings), places.teacher_weights)
        self._stop = threading.Event()
        threading.Thread(target=self._run, name="trainer", daemon=True).start()

    def pid(self) -> int:
        """Process id; answers as soon as the trainer takes jobs."""
        return os.getpid()

    def _run(self) -> None:
        try:
            self._trainer.run(self._stop)
        except BaseException:  # the thread's outer edge: Ray starts the actor anew, which takes the job up again
            logger.exception("the trainer failed")
            os._exit(1)
