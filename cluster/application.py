"""The Serve application: inspecting replicas and the HTTP interface in front; trainer and compactor beside."""

import math
from typing import Any

import ray
from ray import serve
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy

from cluster.autoscaling import BacklogPolicy
from cluster.config import ProctorConfig
from cluster.ingress import build_ingress
from cluster.serve_settings import ServeSettings
from workers.compactor_actor import NAME as COMPACTOR
from workers.compactor_actor import CompactorActor
from workers.places import Places
from workers.settings import WorkerSettings
from workers.trainer_actor import NAME as TRAINER
from workers.trainer_actor import TrainerActor

APPLICATION = "proctor"
NAMESPACE = "proctor"
INSPECTOR = "inspector"
_HEALTH_PERIOD_S = 2.0
_DRAIN_S = 35.0


class Inspector:
    """`workers.replica.Replica` as Serve calls it; imported where it runs, so that deploying loads no PyTorch."""

    def __init__(self, places: Places, settings: WorkerSettings, threads: int) -> None:
        from workers.replica import Replica

        self._replica = Replica(places, settings, threads)

    def check_health(self) -> None:
        """Serve's health check."""
        self._replica.check_health()

    async def __del__(self) -> None:
        """Serve's drain hook."""
        await self._replica.drain()

    async def inspect(self, product: str, data: bytes) -> dict[str, Any]:
        """Judge one image."""
        return await self._replica.inspect(product, data)

    async def describe(self) -> dict[str, Any]:
        """The replica's state."""
        return self._replica.state()


def places_of(config: ProctorConfig, redis_url: str) -> Places:
    """The addresses that the workers need."""
    trained_with = {config.training.teacher: config.training.weights} if config.training.weights else {}
    return Places(
        redis_url=redis_url,
        registry_uri=config.registry.uri,
        results_uri=config.results.uri,
        datasets_uri=config.datasets.uri,
        teacher_weights=trained_with | config.teachers,
    )


def build_application(config: ProctorConfig, places: Places) -> serve.Application:
    """The application as `serve.run` takes it."""
    inspector = serve.deployment(
        Inspector,
        name=INSPECTOR,
        ray_actor_options={"num_cpus": config.serve.num_cpus, "num_gpus": config.serve.num_gpus},
        health_check_period_s=_HEALTH_PERIOD_S,
        health_check_timeout_s=config.worker.heartbeat_timeout_s,
        graceful_shutdown_timeout_s=_DRAIN_S,
        graceful_shutdown_wait_loop_s=0.1,
        max_ongoing_requests=32,
    )
    if config.serve.follows_load:
        inspector = inspector.options(autoscaling_config=autoscaling_config(config.serve))
    else:
        inspector = inspector.options(num_replicas=config.serve.at_start)
    threads = config.serve.threads or math.ceil(config.serve.num_cpus)
    bound = inspector.bind(places, config.worker_settings(), threads)
    return build_ingress(APPLICATION, INSPECTOR, places, config.http.token).bind(bound)


def autoscaling_config(settings: ServeSettings) -> AutoscalingConfig:
    """What Serve needs to follow the backlog; the delays are the policy's, so Serve adds none."""
    return AutoscalingConfig(
        min_replicas=settings.least,
        max_replicas=settings.most,
        initial_replicas=settings.at_start,
        upscale_delay_s=0.0,
        downscale_delay_s=0.0,
        policy=AutoscalingPolicy(
            policy_function=f"{BacklogPolicy.__module__}:{BacklogPolicy.__name__}",
            policy_kwargs={"settings": settings.model_dump(mode="json")},
        ),
    )


def start_trainer(config: ProctorConfig, places: Places, *, detached: bool) -> Any:
    """Start the named trainer actor; its `pid` answers once it takes jobs.

    Args:
        config: training settings and what Ray reserves.
        places: server and stores.
        detached: outlive this driver.
    """
    products = {product: config.training_for(product) for product in config.products}
    actor = _named(TrainerActor, TRAINER, (config.trainer.num_cpus, config.trainer.num_gpus), detached=detached)
    return actor.remote(places, config.training, products)


def start_compactor(config: ProctorConfig, places: Places, *, detached: bool) -> Any:
    """Start the named compactor actor; its `pid` answers once it works, its `drain` does a last round.

    Args:
        config: settings of the results.
        places: server and stores.
        detached: outlive this driver.
    """
    return _named(CompactorActor, COMPACTOR, (0.0, 0.0), detached=detached).remote(places, config.results)


def _named(actor: type, name: str, reserved: tuple[float, float], *, detached: bool) -> Any:
    """The one actor of a name, started anew when it dies; a detached one outlives this driver.

    Args:
        actor: its class.
        name: how it is found.
        reserved: CPUs and GPUs.
        detached: outlive this driver.
    """
    num_cpus, num_gpus = reserved
    return ray.remote(actor).options(
        name=name,
        namespace=NAMESPACE,
        lifetime="detached" if detached else None,
        num_cpus=num_cpus,
        num_gpus=num_gpus,
        max_restarts=-1,
        get_if_exists=True,
    )
