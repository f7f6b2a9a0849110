"""The demo's progress: phases with their times, and on a terminal the live ledger below them."""

import contextlib
import time

import redis
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from cluster.status import Status, render


class DemoProgress:
    """The progress: phases with their times, and on a terminal the live ledger below them."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._server: redis.Redis | None = None
        self._phase = ""
        self._since = self.started = time.monotonic()
        self._live = Live(console=console, get_renderable=self._render, refresh_per_second=4, transient=True)

    def __enter__(self) -> "DemoProgress":
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.phase("")
        else:
            ending = ": interrupted, everything was ended" if kind is KeyboardInterrupt else ""
            self._console.print(f"[red]✗[/] {self._phase}{ending}")
        self._live.stop()

    def watch(self, server: redis.Redis | None) -> None:
        """Show the ledger from now on."""
        self._server = server

    def phase(self, text: str) -> None:
        """Begin a phase; the one before is done."""
        now = time.monotonic()
        if self._phase:
            self._console.print(f"[green]✓[/] {self._phase} [dim]{now - self._since:.1f} s[/]")
        self._phase, self._since = text, now

    def _render(self) -> RenderableType:
        now = Text(f"… {self._phase} {time.monotonic() - self._since:.0f} s", style="cyan")
        if self._server is None:
            return now
        with contextlib.suppress(Exception):  # the display must not end the demo; what is wrong shows elsewhere
            return Group(now, render(Status.read(self._server)))
        return now
