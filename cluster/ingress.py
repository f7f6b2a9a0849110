"""The HTTP interface as a Serve deployment in front of the replicas."""

from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve.handle import DeploymentHandle

from cluster.accounts import RedisAccounts
from cluster.http import build_http
from workers.places import Places


class _HandleInspector:
    """The replicas behind a Serve handle, as the HTTP interface sees them."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self._handle = handle

    async def inspect(self, product: str, data: bytes) -> dict[str, Any]:
        return await self._handle.inspect.remote(product, data)

    async def describe(self) -> dict[str, Any]:
        return await self._handle.describe.remote()


def build_ingress(application: str, inspector: str, places: Places, token: str) -> serve.Deployment:
    """The deployment, to be bound to that of the replicas.

    Args:
        application: name of the Serve application.
        inspector: name of the replicas' deployment.
        places: where the ledger is.
        token: bearer token that requests must carry, empty for none.
    """

    def build() -> FastAPI:  # runs in the interface's own process
        handle = serve.get_deployment_handle(inspector, app_name=application)
        return build_http(_HandleInspector(handle), RedisAccounts(places.connect()), token)

    return serve.deployment(
        serve.ingress(build)(),
        name="http",
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=256,
        graceful_shutdown_wait_loop_s=0.1,
    )
