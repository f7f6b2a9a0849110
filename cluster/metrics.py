"""The ledger and the replicas in the text form that Prometheus reads."""

from collections.abc import Iterable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from workers.ledger import VERDICTS, CameraLedger, ProductLedger

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_CAMERA = ("product", "camera")


class _Collected(Collector):
    """Metrics of one moment."""

    def __init__(self, metrics: Iterable[Metric]) -> None:
        self._metrics = list(metrics)

    def collect(self) -> Iterable[Metric]:
        return self._metrics


def exposition(products: list[ProductLedger], replicas: list[dict[str, Any]]) -> bytes:
    """Return the metrics of ledgers and replicas' reports."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Collected([*_counters(products), *_gauges(products), *_replicas(replicas)]))
    return generate_latest(registry)


def _counters(products: list[ProductLedger]) -> Iterator[Metric]:
    simple = {
        "captured": "Frames taken by the camera",
        "dead": "Entries that went to the dead letters",
        "lost": "Frames lost, found by a gap in their numbers",
    }
    for what, text in simple.items():
        family = CounterMetricFamily(f"proctor_frames_{what}", text, labels=_CAMERA)
        for camera in _cameras(products):
            family.add_metric(_labels(camera), getattr(camera, what))
        yield family
    judged = CounterMetricFamily("proctor_frames_judged", "Frames with a durable row", labels=(*_CAMERA, "verdict"))
    late = CounterMetricFamily("proctor_frames_late", "Judged frames answered by their deadline", labels=_CAMERA)
    shed = CounterMetricFamily("proctor_frames_shed", "Frames given up", labels=(*_CAMERA, "reason"))
    for camera in _cameras(products):
        for verdict in VERDICTS:
            judged.add_metric([*_labels(camera), verdict], camera.verdicts.get(verdict, 0))
        late.add_metric(_labels(camera), camera.verdicts.get("late", 0))
        for reason, count in camera.shed_by.items():
            shed.add_metric([*_labels(camera), reason], count)
    yield from (judged, late, shed)


def _gauges(products: list[ProductLedger]) -> Iterator[Metric]:
    flight = GaugeMetricFamily("proctor_frames_in_flight", "Frames that wait for verdict or row", labels=_CAMERA)
    oldest = GaugeMetricFamily("proctor_oldest_seconds", "Age of the oldest frame in flight", labels=_CAMERA)
    skew = GaugeMetricFamily("proctor_clock_skew_seconds", "Producer's clock minus the server's", labels=_CAMERA)
    balanced = GaugeMetricFamily("proctor_ledger_balanced", "1 while the camera's ledger balances", labels=_CAMERA)
    for camera in _cameras(products):
        flight.add_metric(_labels(camera), camera.in_flight)
        oldest.add_metric(_labels(camera), camera.oldest_s or 0.0)
        balanced.add_metric(_labels(camera), camera.balanced)
        if camera.skew_ms is not None:
            skew.add_metric(_labels(camera), camera.skew_ms / 1e3)
    lag = GaugeMetricFamily("proctor_lag", "Entries that no replica has taken yet", labels=("product",))
    for product in products:
        lag.add_metric([product.product], product.lag)
    yield from (flight, oldest, skew, balanced, lag)


def _replicas(replicas: list[dict[str, Any]]) -> Iterator[Metric]:
    judged = CounterMetricFamily("proctor_replica_judged", "Frames judged by a replica", labels=("replica",))
    trouble = GaugeMetricFamily(
        "proctor_replica_trouble", "1 while something keeps it from its work", labels=("replica",)
    )
    for replica in replicas:
        judged.add_metric([replica["replica"]], replica["judged"])
        trouble.add_metric([replica["replica"]], replica["trouble"] is not None)
    yield from (judged, trouble)


def _cameras(products: list[ProductLedger]) -> Iterator[CameraLedger]:
    return (camera for product in products for camera in product.cameras)


def _labels(camera: CameraLedger) -> list[str]:
    return [camera.product, camera.camera]
