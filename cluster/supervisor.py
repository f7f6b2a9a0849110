"""The supervisor: owns the embedded server, the local Ray and the application, from start to drain.

`proctor up` runs it in the background (`python -m cluster.supervisor`) and reads its progress, one JSON document
a line, from its standard output; everything it owns dies with it.
"""

import contextlib
import fcntl
import json
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from cluster.config import ProctorConfig, load_config
from cluster.connection import connect
from cluster.errors import ProctorError, ServerError
from cluster.guard import guarded
from cluster.origin import check_origin
from cluster.run_state import RunState
from cluster.server import EmbeddedServer, ServerOptions

_OBJECT_STORE_BYTES = 128 * 2**20  # frames travel through Redis, so Ray's store stays almost empty

KEEP = b"keep"  # on standard input: outlive the process that started us

Say = Callable[[str], None]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Running:
    """An application on this machine.

    Attributes:
        state: where it is.
        server: the embedded server, None where another one is configured.
    """

    state: RunState
    server: EmbeddedServer | None

    def wait(self, stop: threading.Event) -> None:
        """Wait for `stop`, and start the embedded server anew should it die; replicas reconnect by themselves."""
        # waking up now and then: a signal that the kernel gives to another thread does not interrupt this one,
        # and only this one runs handlers
        while not stop.wait(0.5):
            if self.server is not None and not self.server.running:
                logger.error("the embedded server died; starting it anew")
                self.server.restart()


@contextlib.contextmanager
def running_application(config: ProctorConfig, say: Say) -> Iterator[Running]:
    """Start everything on this machine, yield it, and stop everything in reverse.

    Args:
        config: the configuration.
        say: told each step in a few words.

    Raises:
        ProctorError: one line that says what to do; whatever was started is stopped.
    """
    check_origin()
    if RunState.find(config.home) is not None:
        raise ProctorError(f"an application already runs from {config.home}: `proctor down` ends it")
    with contextlib.ExitStack() as stack:
        _hold_home(config.home, stack)
        server = _start_redis(config, stack, say)
        redis_url = server.url if server else config.redis.url
        port = _free_http_port(config)
        config = config.model_copy(update={"http": config.http.model_copy(update={"port": port})})
        watch = stack.enter_context(guarded())
        before = set(psutil.Process().children(recursive=True))
        _start_ray(config, None, stack, say)
        watch(set(psutil.Process().children(recursive=True)) - before)
        _deploy(config, redis_url, stack, say, detached=False)
        watch(set(psutil.Process().children(recursive=True)) - before)
        host = config.http.host if config.http.host not in ("0.0.0.0", "::") else "127.0.0.1"
        state = RunState(os.getpid(), psutil.Process().create_time(), redis_url, "local", f"http://{host}:{port}")
        state.write(config.home)
        stack.callback(RunState.remove, config.home)
        yield Running(state, server)
        say("draining")


def deploy_on_cluster(config: ProctorConfig, address: str, say: Say) -> RunState:
    """Deploy on an existing Ray cluster, where the application outlives this process.

    Raises:
        ProctorError: one line that says what to do.
    """
    check_origin()
    if not config.redis.url:
        raise ProctorError("a cluster needs a Redis that all its nodes reach: set redis.url in proctor.toml")
    with contextlib.ExitStack() as stack:
        _start_redis(config, stack, say)
        _start_ray(config, address, stack, say)
        with contextlib.ExitStack() as deployed:
            _deploy(config, config.redis.url, deployed, say, detached=True)
            deployed.pop_all()  # it went well, so it stays
    state = RunState(0, 0.0, config.redis.url, address, f"http://{config.http.host}:{config.http.port}")
    state.write(config.home)
    return state


def remove_from_cluster(config: ProctorConfig, address: str, say: Say) -> None:
    """Drain and remove the application from an existing Ray cluster; the cluster and other applications stay."""
    with contextlib.ExitStack() as stack:
        _start_ray(config, address, stack, say)
        import ray
        from ray import serve

        from cluster.application import APPLICATION, COMPACTOR, NAMESPACE, TRAINER
        from cluster.autoscaling import forget_redis_url

        say("draining")
        serve.delete(APPLICATION)
        forget_redis_url()
        if not serve.status().applications:  # nobody else's either: then its proxy needs not listen
            serve.shutdown()
        with contextlib.suppress(ValueError):  # no trainer of that name: gone already
            ray.kill(ray.get_actor(TRAINER, NAMESPACE))
        with contextlib.suppress(ValueError):
            _end_compactor(ray.get_actor(COMPACTOR, NAMESPACE))
    RunState.remove(config.home)


def _hold_home(home: Path, stack: contextlib.ExitStack) -> None:
    """Keep a second application out of `home` from the first moment; the lock ends with this process."""
    try:
        home.mkdir(parents=True, exist_ok=True)
        lock = stack.enter_context((home / "up.lock").open("w"))
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ProctorError(f"another `proctor up` is starting from {home}: wait for it") from None
    except OSError as error:
        raise ProctorError(f"cannot write to {home} ({error.strerror}): set `home` to another directory") from None


def _start_redis(config: ProctorConfig, stack: contextlib.ExitStack, say: Say) -> EmbeddedServer | None:
    if config.redis.url:
        say("connecting to Redis")
        connect(config.redis.url).close()
        return None
    say("starting the embedded Valkey")
    options = ServerOptions(config.redis.maxmemory_mb, config.redis.appendfsync)
    server = EmbeddedServer.start(config.home / "redis", port=config.redis.port, options=options)
    stack.callback(server.stop)
    return server


def _free_http_port(config: ProctorConfig) -> int:
    """The configured port, checked, since Serve would try a busy one for ever; a free one for 0."""
    with socket.socket(socket.AF_INET6 if ":" in config.http.host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((config.http.host, config.http.port))
        except OSError as error:
            raise ServerError(
                f"port {config.http.port} of {config.http.host} cannot be used for HTTP ({error.strerror}): "
                "set port in [http] of proctor.toml, or PROCTOR_HTTP__PORT, to a free one, or to 0 to have one chosen"
            ) from None
        return int(probe.getsockname()[1])


def _start_ray(config: ProctorConfig, address: str | None, stack: contextlib.ExitStack, say: Say) -> None:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")  # by itself 15: replicas would wait for everything else
    if address:
        _check_address(address)
    if address and _has_ray_token():  # Ray turns it on by itself for a cluster of its own only
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    import ray

    from cluster.application import NAMESPACE

    say(f"connecting to Ray at {address}" if address else "starting Ray")
    try:
        ray.init(
            address=address or "local",
            namespace=NAMESPACE,
            include_dashboard=None if address else False,
            _node_ip_address=None if address else "127.0.0.1",  # then nothing of it listens on other addresses
            object_store_memory=None if address else _OBJECT_STORE_BYTES,
            num_cpus=None if address else cpus_of_local_ray(config),
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        hint = "; a cluster with a token needs it in RAY_AUTH_TOKEN or ~/.ray/auth_token here" if address else ""
        raise ProctorError(f"Ray cannot be started or reached: {str(error).splitlines()[0]}{hint}") from None
    stack.callback(ray.shutdown)


def _check_address(address: str) -> None:
    """Say at once that nothing listens there; Ray would try for minutes."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or "://" in address:
        return
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except OSError as error:
        raise ProctorError(
            f"no Ray cluster answers at {address} ({error.strerror or error}): correct --address"
        ) from None


def _has_ray_token() -> bool:
    named = os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH")
    return bool(named) or (Path.home() / ".ray" / "auth_token").exists()


def cpus_of_local_ray(config: ProctorConfig) -> int:
    """CPUs that a local Ray believes in: at least what the application may reserve, or a laptop would never start."""
    needed = config.serve.most * config.serve.num_cpus + config.trainer.num_cpus
    return max(os.cpu_count() or 1, int(-(-needed // 1)))


def _deploy(config: ProctorConfig, redis_url: str, stack: contextlib.ExitStack, say: Say, *, detached: bool) -> None:
    import ray
    from ray import serve
    from ray.serve.config import HTTPOptions

    from cluster.application import APPLICATION, build_application, places_of, start_compactor, start_trainer
    from cluster.autoscaling import forget_redis_url, tell_redis_url

    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    places = places_of(config, redis_url)
    check_resources(config, ray.cluster_resources(), say)
    if config.serve.follows_load:
        tell_redis_url(redis_url)
        stack.callback(forget_redis_url)
    say("starting replicas and trainer")
    trainer = start_trainer(config, places, detached=detached)
    stack.callback(ray.kill, trainer)
    compactor = start_compactor(config, places, detached=detached)
    stack.callback(_end_compactor, compactor)  # after the replicas, for what they write at last
    serve.start(http_options=HTTPOptions(host=config.http.host, port=config.http.port))
    stack.callback(serve.shutdown)
    try:
        serve.run(build_application(config, places), name=APPLICATION, route_prefix="/")
        ray.get([trainer.pid.remote(), compactor.pid.remote()])
    except RuntimeError as error:
        raise ProctorError(f"the application did not start: {_cause(error)}") from None


def _end_compactor(compactor: Any) -> None:
    """Let it do a last round; what it does not finish stays in segments, which lose nothing."""
    import ray
    from ray.exceptions import RayError

    from workers.compactor_actor import DRAIN_S

    with contextlib.suppress(RayError):
        ray.get(compactor.drain.remote(), timeout=DRAIN_S + 5)
    ray.kill(compactor)


def check_resources(config: ProctorConfig, found: dict[str, float], say: Say) -> None:
    """Refuse what Ray would wait for without end; warn of replicas that the load may want and Ray cannot place.

    Args:
        config: what is reserved.
        found: Ray's resources, all of its nodes together.
        say: told the warning.

    Raises:
        ProctorError: not even the replicas of the start fit.
    """
    for name, key in (("CPU", "num_cpus"), ("GPU", "num_gpus")):
        each, trainer, there = getattr(config.serve, key), getattr(config.trainer, key), found.get(name, 0)
        asked = config.serve.at_start * each + trainer
        if asked > there:
            raise ProctorError(f"[serve] and [trainer] reserve {asked:g} {name}s, Ray has {there:g}: lower {key}")
        if config.serve.most * each + trainer > there:
            fit = int((there - trainer) // each)
            say(f"warning: max_replicas = {config.serve.most}, but Ray's {there:g} {name}s have room for {fit}")


def _cause(error: RuntimeError) -> str:
    """What kept a deployment from starting: the last line of the traceback that Serve keeps of it."""
    from ray import serve

    from cluster.application import APPLICATION

    deployed = serve.status().applications.get(APPLICATION)
    messages = [each.message for each in deployed.deployments.values() if each.message] if deployed else []
    lines = [line.strip() for message in messages for line in message.splitlines() if "Error: " in line]
    return lines[-1] if lines else str(error).splitlines()[0]


def main() -> int:
    """Run in the background until SIGTERM, SIGINT or the end of standard input without `KEEP` on it."""
    options = json.loads(sys.argv[1])
    stop = threading.Event()
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")

    def tell(message: dict[str, object]) -> None:
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps(message), file=progress, flush=True)

    progress = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print belongs into the log
    threading.Thread(target=_follow_starter, args=(stop,), daemon=True).start()
    try:
        config = load_config(Path(options["config"]) if options["config"] else None, Path(options["home"]))
        with running_application(config, lambda step: tell({"step": step})) as running:
            for number in (signal.SIGTERM, signal.SIGINT):  # after Ray, which sets its own
                signal.signal(number, lambda *_: stop.set())
            tell({"ready": True})
            running.wait(stop)
    except ProctorError as error:
        tell({"error": str(error)})
        return 1
    return 0


def _follow_starter(stop: threading.Event) -> None:
    """Stop when the starter ends, however it ends, unless it has said that the application shall be kept."""
    said = b""
    while part := os.read(0, 4096):  # not sys.stdin: a thread in its lock would abort the interpreter's end
        said += part
    if said != KEEP:
        stop.set()


if __name__ == "__main__":
    sys.exit(main())
