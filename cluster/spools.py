"""The spools below `home`: opening a camera's, and `proctor push --replay`, which sends what all of them hold."""

import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import redis

from cluster.config import ProctorConfig
from cluster.connection import connect, unchecked_client
from cluster.errors import ProctorError, ServerAway
from cluster.run_state import redis_url_of
from producers import keys
from producers.errors import ProducerError
from producers.frame import check_camera, check_product
from producers.redis_errors import REDIS_ERRORS
from producers.spool import Spool
from producers.spooling import SpooledPublisher

SERVER_TIMEOUT_S = 2.0  # a server that vanishes from the network holds a camera up for so long, once


@dataclass(frozen=True)
class Replay:
    """What became of one spool.

    Attributes:
        product: the product.
        camera: the camera.
        replayed: frames that went into the stream.
        shed: frames given up and counted.
        lost: frames whose record was damaged.
        waiting: frames and notes that stay.
        error: why it could not be replayed, empty if it could.
    """

    product: str
    camera: str
    replayed: int = 0
    shed: int = 0
    lost: int = 0
    waiting: int = 0
    error: str = ""

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def line(self) -> str:
        """For people."""
        name = f"{self.product}/{self.camera}"
        if self.error:
            return f"{name}: {self.error}"
        parts = [f"{name}: {self.replayed} frames sent"]
        parts += [f"{self.shed} shed"] if self.shed else []
        parts += [f"{self.lost} lost with a damaged spool"] if self.lost else []
        parts += [f"{self.waiting} still wait"] if self.waiting else []
        return ", ".join(parts)


def spooled_publisher(
    config: ProctorConfig, product: str, camera: str, server: redis.Redis, say: Callable[[str], None]
) -> SpooledPublisher:
    """A camera's publisher with its spool, which follows an application that starts anew at another address.

    Raises:
        ProducerError: another producer has the spool, or the disk cannot be used.
    """
    settings = config.publish_settings(product)
    folder = _home_of_spools(config) / check_product(product) / check_camera(camera)
    spool = Spool(folder, int(settings.spool_mb * 2**20), settings.spool_fsync)
    publisher = SpooledPublisher(product, camera, server, spool, settings, say)
    publisher.follow(_Follower(config).moved)
    return publisher


def connect_for_push(config: ProctorConfig, product: str, say: Callable[[str], None]) -> redis.Redis:
    """A client that fails fast where there is a spool to take the frames; then the server may be away at first, too.

    Raises:
        ProctorError: no application, or a server that cannot be used.
    """
    url = redis_url_of(config)
    if not config.publish_settings(product).spool_mb:
        return connect(url)
    try:
        return connect(url, timeout_s=SERVER_TIMEOUT_S, retries=0)
    except ServerAway as error:
        say(str(error))
        return unchecked_client(url, timeout_s=SERVER_TIMEOUT_S)


def replay_spools(
    config: ProctorConfig,
    server: redis.Redis,
    only: tuple[str | None, str | None],
    stop: threading.Event,
    say: Callable[[str], None],
) -> list[Replay]:
    """Send what the spools of cameras that are not pushing hold; `only` names a product, a camera, or None for all."""
    return [
        _replay(config, product, camera, server, stop, say)
        for product, camera in waiting_spools(config)
        if only[0] in (None, product) and only[1] in (None, camera)
    ]


def waiting_spools(config: ProctorConfig) -> list[tuple[str, str]]:
    """Product and camera of every spool below `home` that holds something, those of running pushes too."""
    folders = sorted(_home_of_spools(config).glob("*/*/"))
    return [(folder.parent.name, folder.name) for folder in folders if any(folder.glob("*.seg"))]


def _replay(
    config: ProctorConfig,
    product: str,
    camera: str,
    server: redis.Redis,
    stop: threading.Event,
    say: Callable[[str], None],
) -> Replay:
    try:
        with spooled_publisher(config, product, camera, server, say) as publisher:
            publisher.drain(stop)
    except ProducerError as error:
        return Replay(product, camera, error=str(error))
    counts = publisher.counts()
    return Replay(product, camera, counts.replayed, counts.shed, counts.lost, counts.waiting + counts.notes)


def _home_of_spools(config: ProctorConfig) -> Path:
    return config.home / "spool"


class _Follower:
    """Looks where the application runs now; with `[redis] url`, it stays where it is."""

    def __init__(self, config: ProctorConfig) -> None:
        self._config = config
        self._url = redis_url_of(config)

    def moved(self) -> redis.Redis | None:
        """A client of the new address, None if there is none or it does not serve yet, as while it reads its data.

        It never waits longer than the timeouts of a client: the end of a push waits for it.
        """
        try:
            url = redis_url_of(self._config)
            if url == self._url:
                return None
            client = unchecked_client(url, timeout_s=SERVER_TIMEOUT_S)
        except ProctorError:
            return None
        try:
            client.exists(keys.PRODUCTS)  # not PING: a server whose disk is full refuses that
        except (*REDIS_ERRORS, OSError):
            client.close()
            return None
        self._url = url
        return client
