"""`proctor models`: versions of a product's student."""

from pathlib import Path
from typing import Annotated

import typer

from cluster.terminal import Json, Product, load, out, print_json

models_app = typer.Typer(help="Versions of a product's student.", no_args_is_help=True)


@models_app.command("list")
def models_list(product: Annotated[str | None, typer.Option("--product", "-p")] = None, as_json: Json = False) -> None:
    """Versions of one product or of all."""
    from cluster.versions import list_versions, version_table

    found = list_versions(load(), product)
    if as_json:
        print_json(found)
    else:
        out.print(version_table(found) if found else "no versions yet: `proctor train` makes one")


@models_app.command("show")
def models_show(product: Product, version: Annotated[str | None, typer.Argument()] = None) -> None:
    """Everything recorded of a version, as JSON; by itself of the one in service."""
    from cluster.versions import show_version

    print_json(show_version(load(), product, version))


@models_app.command("promote")
def models_promote(product: Product, version: Annotated[str, typer.Argument()]) -> None:
    """Put a version into service; replicas swap between two batches."""
    from cluster.versions import promote_version

    promote_version(load(), product, version)
    out.print(f"{product}: version {version}, replicas take it over")


@models_app.command("rollback")
def models_rollback(product: Product) -> None:
    """Put the previous version back into service."""
    from cluster.versions import roll_back

    out.print(f"{product}: version {roll_back(load(), product)}, replicas take it over")


@models_app.command("export")
def models_export(
    product: Product, version: Annotated[str, typer.Argument()], to: Annotated[Path, typer.Option()]
) -> None:
    """Copy a version's student.safetensors and model.json into a folder."""
    from cluster.versions import export_version

    export_version(load(), product, version, to)
    out.print(f"{product} {version} exported to {to}")
