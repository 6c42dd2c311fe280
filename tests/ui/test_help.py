"""What `mixofshow ui --help` prints."""

from __future__ import annotations

from typer.testing import CliRunner

from diffusers_mixofshow.cli import app


def test_the_extra_is_printed_with_its_brackets() -> None:
    printed = CliRunner().invoke(app, ["ui", "--help"], env={"COLUMNS": "200"}).stdout
    assert 'pip install "diffusers-mixofshow[ui]"' in printed
