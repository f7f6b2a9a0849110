"""`proctor dead`: what was given up, listed, put back or dropped."""

from dataclasses import asdict
from typing import Annotated, Any

import typer

from cluster.terminal import Json, OneProduct, load, out, print_json

dead_app = typer.Typer(
    help="Dead letters: entries that could not be read, or were delivered too often.", no_args_is_help=True
)

DeadIds = Annotated[list[str] | None, typer.Argument(help="Ids of entries, as `proctor dead list` shows them.")]
DeadAll = Annotated[bool, typer.Option("--all", help="All that are there now.")]


def _dead_letters() -> Any:
    from cluster.connection import connect
    from cluster.run_state import redis_url_of
    from workers.dead_letters import DeadLetters

    return DeadLetters(connect(redis_url_of(load())))


@dead_app.command("list")
def dead_list(
    product: OneProduct = None,
    limit: Annotated[int, typer.Option(min=1, help="Only the newest N of each product.")] = 30,
    as_json: Json = False,
) -> None:
    """What was given up, and why, newest first."""
    from cluster.dead import list_dead

    found = list_dead(_dead_letters(), product, limit)
    if as_json:
        print_json(found.as_dict())
        return
    out.print(found.table() if found.letters else "no dead letters")
    for line in found.lines():
        out.print(line)


@dead_app.command("retry")
def dead_retry(
    ids: DeadIds = None, product: OneProduct = None, everything: DeadAll = False, as_json: Json = False
) -> None:
    """Put entries back into their streams, to be judged after all."""
    from cluster.dead import retry_dead

    outcome = retry_dead(_dead_letters(), product, ids or [], everything)
    if as_json:
        print_json(asdict(outcome))
    else:
        out.print(outcome.line("put back"))
    _say_none(ids, outcome.done)


@dead_app.command("drop")
def dead_drop(
    ids: DeadIds = None, product: OneProduct = None, everything: DeadAll = False, as_json: Json = False
) -> None:
    """Delete entries for good; the ledger goes on to count them as dead."""
    from cluster.dead import drop_dead

    outcome = drop_dead(_dead_letters(), product, ids or [], everything)
    if as_json:
        print_json(asdict(outcome))
    else:
        out.print(outcome.line("dropped"))
    _say_none(ids, outcome.done)


def _say_none(ids: list[str] | None, done: int) -> None:
    """Exit with status 1 when entries were named and none of them could be taken."""
    if ids and not done:
        raise typer.Exit(1)
