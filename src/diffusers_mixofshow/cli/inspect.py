"""``mixofshow inspect``: show the content of an ED-LoRA, or of another program's file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from diffusers_mixofshow.cli.messages import tell
from diffusers_mixofshow.errors import MixOfShowError


def inspect(
    sources: Annotated[
        list[str],
        typer.Argument(
            help="ED-LoRAs or fused packs: files, folders or Hub ids. Or other programs' files: a LoRA, a textual "
            "inversion, the authors' .pth."
        ),
    ],
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON instead of tables; of several sources a list.")
    ] = False,
) -> None:
    """Show kind, base, concepts, ranks, alphas, layers, norms and problems of files.

    Exit code 1 if one of them has problems.

    \b
    With what 'mixofshow demo' leaves, and with a file of another program:
      mixofshow inspect mixofshow-demo/fused
      mixofshow inspect downloads/some_lora.safetensors --json
    """
    summaries, several = [], len(sources) > 1
    for source in sources:
        try:
            summaries.append(_summarise(source))
        except MixOfShowError as error:
            if not several:
                raise
            tell(f"Error: {error}", "red")
    if as_json:
        typer.echo(json.dumps(summaries if several else summaries[0], indent=2))
    else:
        for summary in summaries:
            _print_tables(summary)
    if len(summaries) < len(sources) or any(summary["problems"] for summary in summaries):
        raise typer.Exit(1)


def _summarise(source: str) -> dict[str, Any]:
    from diffusers_mixofshow.cli.sources import read_source
    from diffusers_mixofshow.edlora import EDLoRA
    from diffusers_mixofshow.interop.summary import summary_of_foreign, summary_of_pack

    found = read_source(source)
    summary = summary_of_pack(found) if isinstance(found, EDLoRA) else summary_of_foreign(found)
    files = _find_files(source) if isinstance(found, EDLoRA) else found.files
    return summary | {"source": source, "bytes": sum(file.stat().st_size for file in files) if files else None}


def _find_files(source: str) -> Sequence[Path]:
    """Find an ED-LoRA's files on this disk; none for one on the Hub."""
    path = Path(source)
    return sorted(path.glob("*.safetensors")) if path.is_dir() else [path] if path.exists() else []


def _print_tables(summary: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from diffusers_mixofshow.interop.summary import facts_of, format_norm

    console = Console()
    facts = Table(title=escape(str(summary["source"])), title_justify="left", show_header=False)
    for name, value in facts_of(summary).items():
        facts.add_row(name, escape(str(value)))
    concepts = Table("concept", "class word", "kind", "tokens (mean norm)")
    for concept in summary["concepts"]:
        tokens = "  ".join(f"{token} {format_norm(norm)}" for token, norm in concept["tokens"].items())
        names = (concept["placeholder"], concept["class_word"] or "", concept["kind"] or "", tokens)
        concepts.add_row(*(escape(str(name)) for name in names))
    updates = Table("largest updates", "norm")
    for site, norm in summary["largest_updates"].items():
        updates.add_row(escape(site), format_norm(norm))
    notes = Table("notes")
    for note in summary["notes"]:
        notes.add_row(escape(note), style="yellow")
    problems = Table("problems")
    for problem in summary["problems"]:
        problems.add_row(escape(problem), style="red")
    for table in (facts, concepts, updates, notes, problems):
        if table.row_count:
            console.print(table)
