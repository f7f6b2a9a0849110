"""The HTTP interface: one image in, verdict and map out; ledger, metrics, health and readiness."""

import hmac
from typing import Any, Protocol

from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse, Response

from cluster.errors import ProctorError
from cluster.metrics import CONTENT_TYPE
from workers.errors import StreamUnavailable

MAX_BODY_BYTES = 64 * 2**20


class Inspector(Protocol):
    """What the interface asks; the application gives it a handle to the replicas."""

    async def inspect(self, product: str, data: bytes) -> dict[str, Any]:
        """See `workers.replica.Replica.inspect`."""
        ...

    async def describe(self) -> dict[str, Any]:
        """See `workers.replica.Replica.describe`."""
        ...


class Accounts(Protocol):
    """The ledger as the interface needs it; both raise ProctorError or StreamUnavailable, one line each."""

    def ledger(self, since: str | None, until: str | None, product: str | None) -> dict[str, Any]:
        """The ledger as it stands, or a shift's account from `since` on."""
        ...

    def metrics(self) -> bytes:
        """The metrics in Prometheus' text form."""
        ...


def build_http(inspector: Inspector, accounts: Accounts, token: str) -> FastAPI:
    """The interface around `inspector` and `accounts`.

    Args:
        inspector: judges.
        accounts: the ledger.
        token: bearer token that every request under /api must carry; empty for none.
    """
    app = FastAPI(title="Proctor", docs_url=None, redoc_url=None)

    @app.get("/health")
    async def health() -> dict[str, str]:
        """The interface lives."""
        return {"status": "ok"}

    @app.get("/ready")
    async def ready() -> JSONResponse:
        """A replica inspects: 200, else 503 with the reason."""
        try:
            state = await inspector.describe()
        except Exception as error:  # whatever keeps a replica from answering is the answer
            return JSONResponse({"ready": False, "reason": f"no replica answers: {error}".splitlines()[0]}, 503)
        trouble = state["trouble"]
        body = {"ready": trouble is None, "reason": trouble, "versions": state["versions"]}
        return JSONResponse(body, 200 if trouble is None else 503)

    @app.post("/api/v1/products/{product}/inspect")
    async def inspect(product: str, request: Request) -> JSONResponse:
        """Judge the JPEG or PNG image in the body; 404 without a model, 422 with an `unknown` verdict if unreadable."""
        _authorise(request, token)
        if request.headers.get("content-type", "").startswith("multipart/"):
            raise HTTPException(415, "send the image's bytes as the body, as `curl --data-binary @FILE` does")
        body = await _body(request)
        verdict = await inspector.inspect(product, body)
        if "verdict" not in verdict:
            raise HTTPException(404, f"product {product!r}: {verdict['reason']}")
        return JSONResponse(verdict, 422 if verdict["reason"] else 200)

    _add_accounts(app, accounts, token)
    return app


def _add_accounts(app: FastAPI, accounts: Accounts, token: str) -> None:
    @app.get("/api/v1/ledger")
    def ledger(
        request: Request, since: str | None = None, until: str | None = None, product: str | None = None
    ) -> dict[str, Any]:
        """The ledger as it stands; with `since` (a time, or an age as 8h) that of a shift."""
        _authorise(request, token)
        try:
            return accounts.ledger(since, until, product)
        except ProctorError as error:
            raise HTTPException(400, str(error)) from None
        except StreamUnavailable as error:
            raise HTTPException(503, str(error)) from None

    @app.get("/metrics")
    def metrics(request: Request) -> Response:
        """Ledger and replicas for Prometheus."""
        _authorise(request, token)
        try:
            return Response(accounts.metrics(), media_type=CONTENT_TYPE)
        except StreamUnavailable as error:
            raise HTTPException(503, str(error)) from None


def _authorise(request: Request, token: str) -> None:
    given = request.headers.get("authorization", "").removeprefix("Bearer ")
    if token and not hmac.compare_digest(given.encode(), token.encode()):
        raise HTTPException(401, "send the token of [http] as 'Authorization: Bearer TOKEN'")


async def _body(request: Request) -> bytes:
    """The request's body, refused while it arrives once it is too long."""
    parts: list[bytes] = []
    size = 0
    async for part in request.stream():
        size += len(part)
        if size > MAX_BODY_BYTES:
            raise HTTPException(413, f"the image has more than {MAX_BODY_BYTES // 2**20} MB")
        parts.append(part)
    return b"".join(parts)
