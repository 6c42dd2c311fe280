"""What the command line offers, so that a table in a test can be held against it."""

from __future__ import annotations

from typer.main import get_command

from diffusers_mixofshow import cli


def options_of(verb: str) -> set[str]:
    """Every option of a command by each of its spellings, and its arguments by their names."""
    command = get_command(cli.app).commands[verb]
    return {spelling for each in command.params for spelling in (*each.opts, *each.secondary_opts)}


def named_in(*rows: object) -> set[str]:
    """Every option that stands in rows of texts, however nested."""
    if all(isinstance(row, str) for row in rows):
        return {row for row in rows if row.startswith("--")}
    return set().union(*(named_in(row) if isinstance(row, str) else named_in(*row) for row in rows))
