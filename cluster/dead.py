"""`proctor dead`: what was given up, and what a person makes of it."""

import re
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

from rich.table import Table

from cluster.errors import ProctorError
from workers.dead_letters import DeadCounts, DeadLetter, DeadLetters

_ENTRY_ID = re.compile(r"\d{1,20}-\d{1,20}")


@dataclass(frozen=True)
class DeadList:
    """Dead letters and what became of others.

    Attributes:
        letters: newest first, product by product.
        counts: of every product that has or had some.
    """

    letters: tuple[DeadLetter, ...]
    counts: tuple[DeadCounts, ...]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "entries": [asdict(letter) for letter in self.letters],
            "products": [asdict(counts) for counts in self.counts],
        }

    def table(self) -> Table:
        """For people."""
        table = Table()
        for name in ("id", "product", "camera", "seq", "captured (UTC)", "reason", "bytes"):
            table.add_column(name, overflow="fold")
        for letter in self.letters:
            captured = f"{letter.captured_at:%Y-%m-%d %H:%M:%S}" if letter.captured_at else "-"
            texts = (letter.id, letter.product, letter.camera or "?", letter.seq or "-", captured, letter.reason)
            table.add_row(*(_printable(text) for text in texts), str(letter.size))
        return table

    def lines(self) -> list[str]:
        """What is not in the table."""
        return [
            f"{each.product}: {each.kept} kept, {each.retried} retried, {each.dropped} dropped, {each.trimmed} trimmed"
            for each in self.counts
        ]


@dataclass(frozen=True)
class DeadOutcome:
    """What became of the chosen entries.

    Attributes:
        done: put back or dropped.
        gone: were not there any more.
        noted: cannot be put back, since too little of them was kept.
    """

    done: int
    gone: int
    noted: int

    def line(self, verb: str) -> str:
        """For people."""
        gone = f", {self.gone} not there any more" if self.gone else ""
        noted = f", {self.noted} cannot be put back: their fields were not kept, drop them" if self.noted else ""
        return f"{verb} {self.done}{gone}{noted}"


def list_dead(letters: DeadLetters, product: str | None, limit: int) -> DeadList:
    """The newest `limit` entries of each product, of one or of all."""
    products = [product] if product else letters.products()
    counts = tuple(letters.counts(each) for each in products)
    some = tuple(each for each in counts if each.kept or each.retried or each.dropped or each.trimmed)
    return DeadList(tuple(letter for each in some for letter in islice(letters.of(each.product), limit)), some)


def retry_dead(letters: DeadLetters, product: str | None, ids: list[str], everything: bool) -> DeadOutcome:
    """Put the chosen entries back into their streams.

    Raises:
        ProctorError: the choice is none, or not clear.
    """
    return _each(_chosen(letters, product, ids, everything), letters.retry)


def drop_dead(letters: DeadLetters, product: str | None, ids: list[str], everything: bool) -> DeadOutcome:
    """Delete the chosen entries; they stay counted as dead.

    Raises:
        ProctorError: the choice is none, or not clear.
    """
    return _each(_chosen(letters, product, ids, everything), letters.drop)


def _each(chosen: Iterable[tuple[str, str]], step: Callable[[str, str], str]) -> DeadOutcome:
    outcomes = [step(product, entry_id) for product, entry_id in chosen]
    gone, noted = outcomes.count("gone"), outcomes.count("noted")
    return DeadOutcome(len(outcomes) - gone - noted, gone, noted)


def _chosen(letters: DeadLetters, product: str | None, ids: list[str], everything: bool) -> list[tuple[str, str]]:
    """(product, id) of what was asked for, oldest first, as it is now: what dies meanwhile is not chosen."""
    if everything == bool(ids):
        raise ProctorError("name the entries by their ids, or all of them by --all: `proctor dead list` shows them")
    wrong = next((each for each in ids if not _ENTRY_ID.fullmatch(each)), None)
    if wrong is not None:
        raise ProctorError(f"{wrong[:80]!r} is not the id of a dead letter: `proctor dead list` shows them")
    products = [product] if product else letters.products()
    if everything:
        return [(each, letter.id) for each in products for letter in reversed(list(letters.of(each)))]
    if len(products) == 1:
        return [(products[0], entry_id) for entry_id in ids]
    owners: dict[str, list[str]] = {entry_id: [] for entry_id in ids}
    for each in products:
        for letter in letters.of(each):
            if letter.id in owners:
                owners[letter.id].append(each)
    shared = next((entry_id for entry_id, found in owners.items() if len(found) > 1), None)
    if shared is not None:
        raise ProctorError(f"{shared} is an entry of {' and of '.join(owners[shared])}: choose by --product")
    return [(found[0] if found else products[0], entry_id) for entry_id, found in owners.items()] if products else []


def _printable(text: str) -> str:
    """Text without what would move a terminal's cursor or be read as markup."""
    return "".join(letter if letter.isprintable() else "?" for letter in text).replace("[", "\\[")
