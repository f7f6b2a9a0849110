"""The command line `proctor`. Commands are thin: what they do is in the modules they import when they run."""

import os
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from cluster.bench_commands import bench_app
from cluster.config import ProctorConfig
from cluster.dead_commands import dead_app
from cluster.errors import ProctorError
from cluster.model_commands import models_app
from cluster.terminal import Json, Product, choose, config_file, err, load, out, print_json, say, stop_on_signal, user

app = typer.Typer(
    name="proctor",
    help="Streaming visual inspection with teacher-student models.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.add_typer(models_app, name="models")
app.add_typer(dead_app, name="dead")
app.add_typer(bench_app, name="bench")


class ResultFormat(StrEnum):
    """Forms of `proctor results`."""

    TABLE = "table"
    JSON = "json"
    CSV = "csv"
    PARQUET = "parquet"
    IDS = "ids"


class LedgerFormat(StrEnum):
    """Forms of `proctor ledger`."""

    TABLE = "table"
    JSON = "json"
    CSV = "csv"


class AclFormat(StrEnum):
    """Forms of `proctor redis-acl`."""

    COMMANDS = "commands"
    FILE = "file"


@app.callback()
def common(
    config: Annotated[Path | None, typer.Option("--config", help="Configuration file; else ./proctor.toml.")] = None,
    home: Annotated[Path | None, typer.Option("--home", help="Directory of the run state; else .proctor.")] = None,
) -> None:
    """Streaming visual inspection with teacher-student models."""
    choose(config, home)


# --- the application


@app.command()
def up(
    address: Annotated[str | None, typer.Option(help="An existing Ray cluster; else a local one is started.")] = None,
    foreground: Annotated[bool, typer.Option(help="Stay in the foreground until Ctrl-C.")] = False,
) -> None:
    """Start the application: embedded Valkey, Ray, replicas, trainer, compactor and HTTP interface."""
    from cluster.launch import start_supervisor
    from cluster.supervisor import deploy_on_cluster, running_application

    config = load()
    if address:
        state = deploy_on_cluster(config, address, say)
    elif foreground:
        with running_application(config, say) as running:
            stop = stop_on_signal()
            err.print(f"[green]running[/green] at {running.state.http_url}; Ctrl-C drains and ends")
            running.wait(stop)
        return
    else:
        state = start_supervisor(config, config_file(), linked=False, say=say).state
    ending = f"proctor down --address {address}" if address else "proctor down"
    err.print(f"[green]running[/green] at {state.http_url}; `proctor status` watches, `{ending}` ends it")


@app.command()
def down(address: Annotated[str | None, typer.Option(help="The Ray cluster that it was deployed on.")] = None) -> None:
    """Drain and end the application; streams, results and versions stay."""
    from cluster.launch import take_down
    from cluster.supervisor import remove_from_cluster

    config = load()
    if address:
        remove_from_cluster(config, address, say)
    else:
        take_down(config, say)
    err.print("[green]ended[/green]; nothing was lost: frames that waited are judged after the next `proctor up`")


@app.command()
def status(
    as_json: Json = False,
    once: Annotated[bool, typer.Option(help="Print once instead of refreshing.")] = False,
) -> None:
    """Ledger, lag, speed and version of every camera; refreshes on a terminal until Ctrl-C."""
    from cluster.connection import connect
    from cluster.run_state import redis_url_of
    from cluster.status import Status, render, show_live

    server = connect(redis_url_of(load()))
    if as_json:
        print_json(Status.read(server).as_dict())
    elif once or not out.is_terminal:
        out.print(render(Status.read(server)))
    else:
        show_live(server, out, stop_on_signal().wait)


@app.command()
def ledger(
    since: Annotated[str, typer.Option(help="Start: a time (2026-01-31T06:00) or an age (90s, 15m, 8h, 7d).")] = "8h",
    until: Annotated[str | None, typer.Option(help="End, in the same forms; else now.")] = None,
    product: Annotated[str | None, typer.Option("--product", "-p")] = None,
    form: Annotated[LedgerFormat, typer.Option("--format")] = LedgerFormat.TABLE,
    as_json: Json = False,
) -> None:
    """A shift's account: what became of every frame captured in it, by whole minutes."""
    from cluster.accounts import RedisAccounts
    from cluster.connection import connect
    from cluster.run_state import redis_url_of
    from cluster.shift_report import shift_csv, shift_document, shift_table

    accounts, start, end = RedisAccounts(connect(redis_url_of(load()))).shift(since, until, product)
    if as_json or form is LedgerFormat.JSON:
        print_json(shift_document(accounts, start, end))
    elif form is LedgerFormat.CSV:
        sys.stdout.write(shift_csv(accounts))
    else:
        out.print(shift_table(accounts, start, end))


# --- producing


@app.command()
def push(
    source: Annotated[str | None, typer.Argument(help="A folder of images or a video file.")] = None,
    product: Annotated[str | None, typer.Option("--product", "-p", help="Product's name.")] = None,
    camera: Annotated[str | None, typer.Option("--camera", "-c", help="Camera's name.")] = None,
    fps: Annotated[float | None, typer.Option(min=0.001, help="Frames a second; else as fast as taken.")] = None,
    loop: Annotated[bool, typer.Option("--loop", help="Start over at the end, until Ctrl-C.")] = False,
    replay: Annotated[bool, typer.Option("--replay", help="No source: send what earlier pushes left on disk.")] = False,
    as_json: Json = False,
) -> None:
    """Push a source's frames as a camera; waits while the line is behind, and keeps frames on disk without Redis."""
    from cluster.pushing import push_frames
    from cluster.spools import connect_for_push
    from producers.camera import Camera
    from producers.sources import open_source

    config = load()
    if replay:
        _replay(config, source, (product, camera), as_json)
        return
    if source is None or product is None or camera is None:
        raise ProctorError("push needs a SOURCE, --product and --camera, or --replay: see `proctor push --help`")
    opened = open_source(source, config.publish)
    with_names = Camera(product, camera, opened, fps, loop)
    server = connect_for_push(config, product, say)
    summary = push_frames(with_names, server, config, stop_on_signal(), err)
    if as_json:
        print_json(summary.as_dict())
    else:
        out.print(summary.line())


def _replay(config: ProctorConfig, source: str | None, only: tuple[str | None, str | None], as_json: bool) -> None:
    from cluster.connection import connect
    from cluster.run_state import redis_url_of
    from cluster.spools import replay_spools

    if source is not None:
        raise ProctorError(f"--replay sends what is in the spool and takes no source: leave {source} out")
    replays = replay_spools(config, connect(redis_url_of(config)), only, stop_on_signal(), say)
    if as_json:
        print_json([each.as_dict() for each in replays])
    else:
        for each in replays:
            out.print(each.line(), markup=False, highlight=False)
        if not replays:
            out.print("no spool holds a frame")
    left = [each for each in replays if each.waiting or each.error]
    if left:
        raise ProctorError(f"{len(left)} of {len(replays)} spools were not emptied: they stay as they are")


# --- training


@app.command()
def train(
    product: Product,
    images: Annotated[
        list[Path] | None, typer.Option(help="Folder of normal images; else those of the version in service.")
    ] = None,
    recipe: Annotated[str | None, typer.Option(help="fast, accurate or paper, if not as configured.")] = None,
    detector: Annotated[str | None, typer.Option(help="Detector, if not the configured one.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Training steps, if not as configured.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Seed, if not the configured one.")] = None,
    promote: Annotated[bool, typer.Option(help="Put the version into service when it is done.")] = True,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Start from random weights, not the version in service.")
    ] = False,
    wait: Annotated[bool, typer.Option("--wait", help="Wait for the end and show the progress.")] = False,
    as_json: Json = False,
) -> None:
    """Train a version on normal images and the approved frames, outside the serving path."""
    from cluster.connection import connect
    from cluster.run_state import redis_url_of
    from cluster.training import await_service, new_job, wait_for
    from models.settings import recipe_changes
    from workers.jobs import Jobs

    config = load()
    chosen = {"detector": detector, "steps": steps, "seed": seed}
    overrides = (recipe_changes(recipe) if recipe else {}) | {k: v for k, v in chosen.items() if v is not None}
    if recipe and overrides["detector"] != recipe_changes(recipe)["detector"]:
        del overrides["detector_options"]  # they are those of the recipe's own detector
    job = new_job(config, product, images or [], overrides)
    server = connect(redis_url_of(config))
    jobs = Jobs(server)
    job = jobs.submit(job.model_copy(update={"promote": promote, "fresh": fresh, "creator": user()}))
    if wait:
        job = wait_for(jobs, job, err)
    if as_json:
        print_json(job.model_dump(mode="json"))
    if job.state == "failed":
        raise ProctorError(f"job {job.id} failed: {job.error}")
    if job.remark:
        say(job.remark)
    if wait and not as_json:
        in_service = promote and await_service(server, product, job.version)
        out.print(f"{product}: version {job.version}" + (" in service" if in_service else ", not in service"))
    elif not as_json:
        out.print(f"queued job {job.id}; `proctor jobs` shows its progress")


@app.command()
def jobs(as_json: Json = False) -> None:
    """Training jobs, newest first."""
    from cluster.connection import connect
    from cluster.run_state import redis_url_of
    from cluster.training import job_table
    from workers.jobs import Jobs

    found = Jobs(connect(redis_url_of(load()))).all()
    if as_json:
        print_json([job.model_dump(mode="json") for job in found])
    else:
        out.print(job_table(found) if found else "no jobs yet: `proctor train` queues one")


@app.command()
def approve(
    frame_ids: Annotated[list[str], typer.Argument(help="Frames as product/camera/seq; - reads standard input.")],
    defect: Annotated[bool, typer.Option("--defect", help="A missed defect instead of a normal piece.")] = False,
    by: Annotated[str | None, typer.Option(help="Who says so; else the user.")] = None,
    as_json: Json = False,
) -> None:
    """Record that frames show normal pieces; the next training learns them."""
    from workers.approvals import Approvals

    config = load()
    if frame_ids == ["-"]:
        frame_ids = sys.stdin.read().split()
        if not frame_ids:
            raise ProctorError("no frame ids on standard input: `proctor results --format ids` prints some")
    approvals = Approvals(config.datasets.uri, config.results.uri)
    recorded = approvals.approve(frame_ids, "defect" if defect else "normal", by or user())
    if as_json:
        print_json([approval.model_dump(mode="json") for approval in recorded])
    else:
        out.print(f"recorded {len(recorded)} as {'defect' if defect else 'normal'} by {by or user()}")


# --- results


@app.command()
def results(
    product: Annotated[str | None, typer.Option("--product", "-p")] = None,
    since: Annotated[str | None, typer.Option(help="A time (2026-01-31T06:00) or an age (90s, 15m, 8h, 7d).")] = None,
    verdict: Annotated[str | None, typer.Option(help="Only pass, fail or unknown.")] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Only the newest N; else 30 in a table, all elsewhere.")
    ] = None,
    form: Annotated[ResultFormat, typer.Option("--format")] = ResultFormat.TABLE,
    to: Annotated[Path | None, typer.Option("--out", help="A file instead of standard output.")] = None,
) -> None:
    """Results, each frame once, in order of capture."""
    from cluster.reading import read_selection, result_table, write_results

    config = load()
    table = read_selection(config, product, since, verdict, heavy=form is ResultFormat.PARQUET)
    if form is ResultFormat.TABLE and to is not None:
        raise ProctorError("--out needs --format json, csv, parquet or ids")
    if form is ResultFormat.TABLE:
        out.print(result_table(table, limit or 30))
    else:
        write_results(table if limit is None else table.slice(max(0, table.num_rows - limit)), form.value, to)


@app.command()
def compact(as_json: Json = False) -> None:
    """One round of the compactor by hand; the application does them by itself."""
    from cluster.compacting import compact_once

    done = compact_once(load())
    if as_json:
        print_json(done.as_dict())
    else:
        out.print(done.line())


# --- measuring


@app.command()
def evaluate(
    data: Annotated[Path, typer.Option(help="A labelled set, or a folder of sets.")],
    detector: Annotated[list[str] | None, typer.Option(help="Detector, if not the recipe's; more to compare.")] = None,
    compare: Annotated[str | None, typer.Option(help="Detectors side by side, as a,b,c.")] = None,
    option: Annotated[
        list[str] | None, typer.Option(help="Detector's option, name=value or outer.inner=value.")
    ] = None,
    teacher: Annotated[str | None, typer.Option(help="Teacher, if not the recipe's.")] = None,
    weights: Annotated[Path | None, typer.Option(help="The teacher's local weights file.")] = None,
    recipe: Annotated[str | None, typer.Option(help="fast, the default; accurate; paper: STFPM as published.")] = None,
    product: Annotated[str | None, typer.Option(help="As the configuration has it trained, not by a recipe.")] = None,
    steps: Annotated[int | None, typer.Option(min=1)] = None,
    input_size: Annotated[int | None, typer.Option(min=64)] = None,
    false_reject_rate: Annotated[float | None, typer.Option(help="Share of normal images that may fail.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Trainings per set, seeds 0, 1, ...")] = 1,
    to: Annotated[Path | None, typer.Option("--out", help="Folder for figures, scores and a page to look at.")] = None,
    as_json: Json = False,
) -> None:
    """Train on a labelled set's normal images and measure how well its defects are found. Needs no application."""
    from cluster.evaluating import evaluate_detectors, remarks
    from cluster.evaluation_choice import base_settings, chosen_settings
    from cluster.evaluation_tables import evaluation_tables
    from models.figures import as_document

    overrides = {
        "teacher": teacher,
        "weights": str(weights) if weights else None,
        "steps": steps,
        "input_size": input_size,
        "false_reject_rate": false_reject_rate,
    }
    names = [*(detector or []), *([] if compare is None else (name.strip() for name in compare.split(",")))]
    config = load()
    base = base_settings(config, recipe, product)
    changes = {name: value for name, value in overrides.items() if value is not None}
    chosen = chosen_settings(base, names, option or [], changes, config.teachers)
    evaluations = evaluate_detectors(data, chosen, range(seeds), to, err)
    if as_json:
        print_json(as_document(evaluations))
    else:
        for table in evaluation_tables(evaluations):
            out.print(table.render())
    for line in remarks(evaluations):
        say(line)
    if to is not None:
        say(f"report in {to / 'index.html'}")


@app.command()
def demo(
    frames: Annotated[int, typer.Option(min=100, help="Frames that the two cameras push, about.")] = 900,
    keep: Annotated[bool, typer.Option("--keep", help="Leave everything running at the end.")] = False,
    as_json: Json = False,
) -> None:
    """Everything once on real solar cells: train, inspect, approve, retrain under load, swap; then a summary."""
    from cluster.demo import run_demo

    summary = run_demo(frames, keep, err)
    if as_json:
        print_json(summary.as_dict())
    else:
        out.print(summary.render())


@app.command()
def doctor(as_json: Json = False) -> None:
    """Look for what is wrong with this machine, configuration and application."""
    from cluster.doctor import examine, findings_table

    findings = examine(load)
    if as_json:
        print_json([finding.as_dict() for finding in findings])
    else:
        out.print(findings_table(findings))
    if any(finding.state == "wrong" for finding in findings):
        raise typer.Exit(1)


@app.command("redis-acl")
def redis_acl(
    product: Annotated[list[str] | None, typer.Option("--product", "-p", help="Only these; else all.")] = None,
    form: Annotated[AclFormat, typer.Option("--format", help="ACL SETUSER commands, or lines of an aclfile.")] = (
        AclFormat.COMMANDS
    ),
    password_stdin: Annotated[
        bool, typer.Option("--password-stdin", help="Passwords of producer, inspector, console from standard input.")
    ] = False,
    drop_oldest: Annotated[
        bool, typer.Option("--drop-oldest", help="Cameras may delete frames, as the policy drop_oldest does.")
    ] = False,
) -> None:
    """Users of Redis for cameras, workers and people, each with the rights that it needs and no more."""
    from cluster.acl import ROLES, acl_lines, new_passwords

    passwords = sys.stdin.read().splitlines() if password_stdin else new_passwords()
    lines = acl_lines(product or [], passwords, form is AclFormat.FILE, drop_oldest)
    sys.stdout.write("".join(f"{line}\n" for line in lines))
    if not password_stdin:
        for role, password in zip(ROLES, passwords, strict=True):
            sys.stderr.write(f"{role.user}: password {password}\n")


def main() -> None:
    """Entry point: a user's mistake is one line on standard error, never a traceback."""
    from models.errors import ModelError
    from producers.errors import ProducerError
    from workers.errors import WorkerError

    try:
        app()
    except (ProctorError, ProducerError, ModelError, WorkerError) as error:
        sys.stderr.write(f"proctor: {error}\n")
        sys.exit(1)
    except SystemExit as ending:
        if ending.code == 130:  # typer's answer to Ctrl-C, without a word
            sys.stderr.write("proctor: interrupted\n")
        raise
    except BrokenPipeError:  # the reader of our output has gone; that is its right
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)


if __name__ == "__main__":
    main()
