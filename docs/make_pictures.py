"""Draws `docs/status.svg`: what `proctor status` shows of a running application while a product is retrained.

With cameras streaming and `proctor train` under way, in the directory that the application was started from:

    python docs/make_pictures.py
"""

import argparse
import io
import re
import time
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import DIMMED_MONOKAI

from cluster.config import load_config
from cluster.connection import connect
from cluster.run_state import redis_url_of
from cluster.status import Status, render

PICTURE = Path(__file__).with_name("status.svg")
COLUMNS = 108
PATIENCE_S = 120.0
FONTS = "ui-monospace, Menlo, Consolas, 'DejaVu Sans Mono', monospace"


def busy_moment(home: Path | None) -> Status:
    """Return the first look at which frames of two cameras wait while a student is half trained."""
    server = connect(redis_url_of(load_config(home=home)))
    give_up_at = time.monotonic() + PATIENCE_S
    while time.monotonic() < give_up_at:
        status = Status.read(server)
        waiting = [camera for product in status.products for camera in product.cameras if camera.in_flight]
        if len(waiting) > 1 and any(2 * job.step > job.steps for job in status.jobs):
            return status
        time.sleep(0.01)
    raise SystemExit("two cameras with frames in flight and a running training did not come together")


def draw(status: Status, picture: Path) -> None:
    """Write the picture; it takes its font from the reader's machine and nothing from another host."""
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    console.print(render(status))
    svg = console.export_svg(title="proctor status", theme=DIMMED_MONOKAI, unique_id="status")
    svg = re.sub(r"@font-face \{.*?\}\s*|<!--.*?-->\s*", "", svg, flags=re.DOTALL)
    svg = svg.replace("Fira Code, monospace", FONTS)
    picture.write_text(re.sub(r"[ \t]+$", "", svg, flags=re.MULTILINE), encoding="utf-8")


def main() -> None:
    """Draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--home", type=Path, help="the application's directory, if not the configured one")
    parser.add_argument("--out", type=Path, default=PICTURE, help="where the picture goes")
    arguments = parser.parse_args()
    draw(busy_moment(arguments.home), arguments.out)


if __name__ == "__main__":
    main()
