"""The registry of versions: `{root}/{product}/{version}/student.safetensors` beside `model.json`.

A version exists from the moment its `model.json` does. That file is written last and whole, so a reader never
sees a version without its complete student, and what a crash leaves behind is never listed.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

import safetensors.torch
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError
from torch import Tensor, nn

from models.cards import ModelCard, ModelDraft, ProductName
from models.errors import VersionError
from models.storage import Storage

_VERSION = re.compile(r"[0-9]{8}T[0-9]{6}-[0-9a-f]{4}")
_PRODUCT: TypeAdapter[str] = TypeAdapter(ProductName)


class Registry:
    """Versions of every product under one address. Any number of processes may read and publish.

    Args:
        uri: Local path, `file://` or `s3://` address; made when the first version is published.
    """

    def __init__(self, uri: str | Path) -> None:
        self._storage = Storage(uri)
        self.uri = self._storage.uri

    def publish(self, draft: ModelDraft, student: nn.Module | Mapping[str, Tensor]) -> ModelCard:
        """Store a student and its card as a new version.

        Raises:
            VersionError: The registry cannot be written; then nothing was published.
        """
        state = student.state_dict() if isinstance(student, nn.Module) else student
        weights = safetensors.torch.save({key: value.detach().cpu().contiguous() for key, value in state.items()})
        created_at, version = self._claim(draft.product)
        card = ModelCard(
            **dict(draft),
            version=version,
            student_sha256=hashlib.sha256(weights).hexdigest(),
            created_at=created_at,
        )
        folder = f"{draft.product}/{version}"
        try:
            self._storage.write(f"{folder}/student.safetensors", weights)
            # Last: this file makes the version visible, and by now its student is durable.
            self._storage.write(f"{folder}/model.json", card.to_json().encode())
        except VersionError:
            self._storage.remove(folder)
            raise
        return card

    def card(self, product: str, version: str) -> ModelCard:
        """Return what is recorded about a version.

        Raises:
            VersionError: No such version, or its record is unreadable.
        """
        self._check(product, version)
        name = f"{product}/{version}"
        if not self._storage.exists(f"{name}/model.json"):
            raise VersionError(f"registry {self.uri} has no version {name}")
        try:
            card = ModelCard.model_validate_json(self._storage.read(f"{name}/model.json"))
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(part) for part in first["loc"]) or "the file"
            raise VersionError(f"version {name}: model.json is malformed: {place}: {first['msg']}") from None
        if (card.product, card.version) != (product, version):
            raise VersionError(f"version {name}: model.json belongs to {card.product}/{card.version}")
        return card

    def load_student(self, product: str, version: str) -> tuple[ModelCard, dict[str, Tensor]]:
        """Return a version's card and its student's state dict, on the CPU.

        Raises:
            VersionError: As for `card`, or the weights are missing or not those that were published.
        """
        card = self.card(product, version)
        weights = self._storage.read(f"{product}/{version}/student.safetensors")
        if hashlib.sha256(weights).hexdigest() != card.student_sha256:
            raise VersionError(f"version {product}/{version}: student.safetensors is damaged (sha256 differs)")
        try:
            return card, safetensors.torch.load(weights)
        except SafetensorError as error:
            raise VersionError(f"version {product}/{version}: student.safetensors is unreadable ({error})") from None

    def versions(self, product: str) -> list[ModelCard]:
        """Return the cards of a product's versions, oldest first.

        Raises:
            VersionError: A published version's record is unreadable.
        """
        names = [name for name in self._storage.folders(self._product(product)) if _VERSION.fullmatch(name)]
        complete = [name for name in names if self._storage.exists(f"{product}/{name}/model.json")]
        cards = [self.card(product, name) for name in complete]
        # Within one second the random digits do not tell the order.
        return sorted(cards, key=lambda card: (card.created_at, card.version))

    def latest(self, product: str) -> ModelCard:
        """Return the newest version's card.

        Raises:
            VersionError: The product has no version.
        """
        cards = self.versions(product)
        if not cards:
            raise VersionError(f"registry {self.uri} has no version of product '{product}'")
        return cards[-1]

    def products(self) -> list[str]:
        """Return the names of the products that have a version, sorted."""
        return [name for name in self._storage.folders("") if _is_product(name) and self.versions(name)]

    def _claim(self, product: str) -> tuple[datetime, str]:
        """Return time and id of a new version; its folder is made, so no other publisher takes it."""
        while True:
            created_at = _now()
            version = f"{created_at:%Y%m%dT%H%M%S}-{secrets.token_hex(2)}"
            if self._storage.claim(f"{product}/{version}"):
                return created_at, version

    def _check(self, product: str, version: str) -> None:
        self._product(product)
        if not _VERSION.fullmatch(version):
            raise VersionError(f"'{version}' is no version id, expected for example 20261123T014512-3fa9")

    def _product(self, name: str) -> str:
        """Refuse names that could leave the registry's folder."""
        if not _is_product(name):
            raise VersionError(f"'{name}' is no product name, expected [a-z0-9][a-z0-9_-]{{0,62}}")
        return name


def _now() -> datetime:
    return datetime.now(UTC)


def _is_product(name: str) -> bool:
    try:
        _PRODUCT.validate_python(name)
    except ValidationError:
        return False
    return True
