"""``mixofshow doctor``: check the installation and the machine, and say how to fix what does not work."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from diffusers_mixofshow.errors import ConfigurationError


_MARKS = {"ok": "green", "note": "yellow", "problem": "red"}
_SECTIONS = {
    "How to fix it": ("problem",),
    "Could be better": ("ok", "note"),
    "Not installed, and not needed for anything else": ("optional",),
}
"""Heading to the states of the findings whose remedies stand under it."""


def doctor(
    named: Annotated[
        str | None,
        typer.Argument(
            metavar="BASE",
            help="Also tell what is known of this base model: a Hub id, a folder or a checkpoint of one file.",
        ),
    ] = None,
    base: Annotated[str | None, typer.Option(help="The same, as other verbs name it.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Check versions, devices, memory, caches and extras, and say how to fix what does not work.

    Exit code 1 if something that is needed does not work. Nothing is downloaded.

    \b
    Examples:
      mixofshow doctor
      mixofshow doctor --base toyland
    """
    from dataclasses import asdict

    from diffusers_mixofshow.cli.diagnosis import check_base_model, diagnose

    if named is not None and base is not None:
        raise ConfigurationError(f"Got two base models, {named} and --base {base}. Give one of them.")
    base = named or base
    findings = diagnose() if base is None else [*diagnose(), check_base_model(base)]
    if as_json:
        typer.echo(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        _print_table([asdict(finding) for finding in findings])
    if any(finding.state == "problem" for finding in findings):
        raise typer.Exit(1)


def _print_table(findings: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Column, Table

    columns = (Column(""), Column(""), Column("found", overflow="fold"))
    table = Table(*columns, title="mixofshow doctor", title_justify="left")
    for finding in (each for each in findings if each["state"] in _MARKS):
        state = f"[{_MARKS[finding['state']]}]{finding['state']}[/]"
        table.add_row(state, escape(finding["name"]), escape(finding["found"]))
    console = Console()
    console.print(table)
    if all(finding["state"] != "problem" for finding in findings):
        console.print("Nothing has to be fixed.")
    for heading, states in _SECTIONS.items():  # outside of the table, which would break commands over lines
        remedies = [
            f"  {one['name']}: {one['remedy']}" for one in findings if one["state"] in states and one["remedy"]
        ]
        if remedies:
            console.print("\n".join([f"{heading}:", *remedies]), markup=False, highlight=False, soft_wrap=True)
