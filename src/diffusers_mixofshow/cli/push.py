"""``mixofshow push``: an ED-LoRA or a fused pack to the Hub."""

from __future__ import annotations

import json
from typing import Annotated

import typer


def push(
    source: Annotated[str, typer.Argument(help="ED-LoRA or fused pack: folder or file.")],
    repo_id: Annotated[
        str | None,
        typer.Argument(help="user/name on the Hub, or a name under your account. (default: made from the concepts)"),
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    revision: Annotated[
        str | None, typer.Option(help="Branch to commit to, created where it is missing. (default: main)")
    ] = None,
    message: Annotated[str | None, typer.Option(help="Commit message. (default: names the concepts)")] = None,
    merged: Annotated[
        bool, typer.Option("--merged", help="Push a complete pipeline with the updates in its weights.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Read and check everything, and send nothing.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Send an ED-LoRA or a fused pack with its model card to the Hugging Face Hub, in one commit.

    Log in once with `hf auth login`.

    \b
    Example:
      mixofshow push edlora-potter --private
    """
    from diffusers_mixofshow.edlora import EDLoRA
    from diffusers_mixofshow.edlora.hub import repo_name

    pack = EDLoRA.from_pretrained(source)
    if dry_run:
        target = repo_id or repo_name(pack.concepts)
        names = ", ".join(concept.placeholder for concept in pack.concepts)
        told = {"repo_id": target, "concepts": [concept.placeholder for concept in pack.concepts], "private": private}
        typer.echo(json.dumps(told) if as_json else f"Would push {names} to {target}")
        return
    url = pack.push_to_hub(repo_id, merged=merged, private=private or None, revision=revision, commit_message=message)
    typer.echo(json.dumps({"url": url}) if as_json else f"Pushed to {url}")
