"""`proctor bench`: the programs that measure this machine."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from cluster.errors import ProctorError
from cluster.origin import check_origin
from cluster.terminal import Json, out, print_json, say
from workers.settings import WorkerSettings

bench_app = typer.Typer(help="Measured figures of this machine; needs no application.", no_args_is_help=True)

_PICTURES = (".png", ".svg", ".pdf")
Quick = Annotated[bool, typer.Option("--quick", help="Whether it works, in seconds; no figure to quote.")]
Plot = Annotated[Path | None, typer.Option(help="Picture to draw.")]
Threads = Annotated[int, typer.Option(min=1, help="CPU threads of the engine; 1 is a replica's default.")]
Frames = Annotated[int, typer.Option(min=16, help="Frames of each measurement.")]


@bench_app.callback()
def _check() -> None:
    # many projects have a folder of this name
    check_origin(("benchmarks",))


@bench_app.command("engine")
def bench_engine(
    quick: Quick = False,
    threads: Threads = 1,
    weights: Annotated[Path | None, typer.Option(help="Local ResNet-18 weights; else random, as fast.")] = None,
    network: Annotated[list[str] | None, typer.Option(help="Of the rows, if not all; may be repeated.")] = None,
    plot: Plot = None,
    as_json: Json = False,
) -> None:
    """The engine over batches and products, beside the device's peak and a network for each product.

    All networks take up to half an hour; --network pair --network default takes five to ten minutes.
    """
    _check_picture(plot)
    from benchmarks.engine import measure
    from cluster.bench_tables import engine_tables

    networks = [_network(name) for name in network or ()]
    document = measure(weights, threads, quick, say, networks or None)
    _print(document, as_json, *engine_tables(document))
    if plot is not None:
        from benchmarks.plots import plot_engine

        _draw(plot_engine, document, plot)


@bench_app.command("stream")
def bench_stream(quick: Quick = False, frames: Frames = 4000, as_json: Json = False) -> None:
    """Frames through a Valkey of its own without a network, beside a plain stream of the same bytes."""
    from benchmarks.stream import measure
    from cluster.bench_tables import stream_table

    document = measure(frames, quick, say)
    _print(document, as_json, stream_table(document))


@bench_app.command("pipeline")
def bench_pipeline(
    quick: Quick = False,
    network: Annotated[
        str, typer.Option(help="That judges: default, pair (ResNet-18 twice, 256²), or a detector beside ResNet-18.")
    ] = "default",
    threads: Threads = 1,
    decode_threads: Annotated[int, typer.Option(min=1, help="Threads that decode.")] = WorkerSettings().decode_threads,
    gpu_decode: Annotated[bool, typer.Option("--gpu-decode", help="The GPU decodes JPEGs, if there is one.")] = False,
    frames: Frames = 2000,
    plot: Plot = None,
    as_json: Json = False,
) -> None:
    """From a Valkey of its own to durable rows, beside each stage alone."""
    _check_picture(plot)
    from benchmarks.networks import NETWORKS
    from benchmarks.pipeline import measure
    from cluster.bench_tables import pipeline_table

    chosen = NETWORKS[_network(network)]
    settings = WorkerSettings(decode_threads=decode_threads, gpu_decode=gpu_decode)
    document = measure(frames, threads, quick, say, settings, chosen)
    _print(document, as_json, pipeline_table(document))
    if plot is not None:
        from benchmarks.plots import plot_pipeline

        _draw(plot_pipeline, document, plot)


def _print(document: dict[str, Any], as_json: bool, *tables: Table) -> None:
    if as_json:
        print_json(document)
    else:
        out.print(*tables, sep="\n")


def _network(name: str) -> str:
    from benchmarks.networks import NETWORKS

    if name not in NETWORKS:
        raise ProctorError(f"no network named {name!r}; there are {', '.join(NETWORKS)}")
    return name


def _check_picture(plot: Path | None) -> None:
    """Refuse a picture that could not be drawn, before minutes of measuring."""
    if plot is not None and plot.suffix.lower() not in _PICTURES:
        raise ProctorError(f"--plot {plot}: expected a name that ends in {', '.join(_PICTURES)}")
    if plot is not None and not plot.absolute().parent.is_dir():
        raise ProctorError(f"--plot {plot}: no such folder: {plot.absolute().parent}")
    if plot is not None and plot.is_dir():
        raise ProctorError(f"--plot {plot}: this is a folder; name a file")


def _draw(plot: Callable[[dict[str, Any], Path], None], document: dict[str, Any], to: Path) -> None:
    try:
        plot(document, to)
    except OSError as error:
        raise ProctorError(f"cannot write {to}: {error.strerror or error}") from None
