"""``mixofshow inspect``: what is in an ED-LoRA."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer


if TYPE_CHECKING:
    from diffusers_mixofshow.edlora import EDLoRA


def inspect(
    source: Annotated[str, typer.Argument(help="An ED-LoRA or fused pack: file, folder or Hub id.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Show the concepts, base model, ranks, layers and norms of an ED-LoRA.

    Example: mixofshow inspect edlora-potter
    """
    from diffusers_mixofshow.edlora import EDLoRA

    summary = summarize(EDLoRA.from_pretrained(source)) | {"source": source, "bytes": _size_of(source)}
    if as_json:
        typer.echo(json.dumps(summary, indent=2))
    else:
        _print_tables(summary)


def summarize(pack: EDLoRA) -> dict[str, Any]:
    """Gather what a pack holds as JSON values."""
    ranks = sorted({update.rank for update in pack.lora.values()})
    return {
        "base_model": pack.base_model,
        "concepts": [
            {
                "placeholder": concept.placeholder,
                "class_word": concept.class_word,
                "kind": concept.kind,
                "tokens": {token: _mean_norm(pack.embeddings[token]) for token in concept.tokens},
            }
            for concept in pack.concepts
        ],
        "ranks": ranks,
        "adapted_layers": len(pack.lora),
        "cross_attention_layers": len(pack.layers),
        "parameters": sum(tensor.numel() for tensor in _tensors(pack)),
        "largest_updates": _largest_updates(pack, count=5),
        "training": dict(pack.training),
    }


def _tensors(pack: EDLoRA) -> list[Any]:
    halves = [half for update in pack.lora.values() for half in (update.down, update.up)]
    return [*pack.embeddings.values(), *halves]


def _mean_norm(embedding: Any) -> float:
    """Mean length of a layer-wise embedding, shape (layers, dim)."""
    return round(float(embedding.float().norm(dim=1).mean()), 4)


def _largest_updates(pack: EDLoRA, count: int) -> dict[str, float]:
    """The layers whose low-rank update has the largest Frobenius norm."""
    from diffusers_mixofshow.edlora.low_rank import low_rank_delta

    norms = {site: round(float(low_rank_delta(update).float().norm()), 4) for site, update in pack.lora.items()}
    return dict(sorted(norms.items(), key=lambda item: -item[1])[:count])


def _size_of(source: str) -> int | None:
    path = Path(source)
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files) if path.exists() else None


def _print_tables(summary: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    facts = Table(title=escape(str(summary["source"])), title_justify="left", show_header=False)
    size = "on the Hub" if summary["bytes"] is None else f"{summary['bytes'] / 1e6:.2f} MB"
    rows = {
        "base model": summary["base_model"],
        "rank": ", ".join(map(str, summary["ranks"])),
        "adapted layers": summary["adapted_layers"],
        "cross-attention layers": summary["cross_attention_layers"],
        "parameters": f"{summary['parameters']:,}",
        "size": size,
    }
    for name, value in rows.items():
        facts.add_row(name, escape(str(value)))
    concepts = Table("concept", "class word", "kind", "tokens (mean norm)")
    for concept in summary["concepts"]:
        tokens = "  ".join(f"{token} {norm:.3f}" for token, norm in concept["tokens"].items())
        names = (concept["placeholder"], concept["class_word"], concept["kind"], tokens)
        concepts.add_row(*(escape(str(name)) for name in names))
    updates = Table("largest updates", "norm")
    for site, norm in summary["largest_updates"].items():
        updates.add_row(escape(site), f"{norm:.3f}")
    for table in (facts, concepts, updates):
        console.print(table)
