"""``mixofshow push``: upload an ED-LoRA or a fused pack to the Hub."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from diffusers_mixofshow.cli.messages import tell
from diffusers_mixofshow.errors import ConfigurationError


if TYPE_CHECKING:
    from diffusers_mixofshow.edlora import EDLoRA


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
    create_pr: Annotated[
        bool, typer.Option("--create-pr", help="Open a pull request, as for repositories of others.")
    ] = False,
    license: Annotated[
        str | None, typer.Option(help="Licence for the model card, e.g. apache-2.0. (default: the base model's)")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Read and check everything, and send nothing.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Send an ED-LoRA or a fused pack with its model card to the Hugging Face Hub, in one commit.

    Of a pack fused from plain LoRAs, give the repository's name, too.

    Log in once with `hf auth login`.

    \b
    With what 'mixofshow demo' leaves, without sending it; then one of your own:
      mixofshow push mixofshow-demo/concepts/rex --dry-run
      mixofshow push edlora-potter --private
    """
    from huggingface_hub import get_token

    from diffusers_mixofshow.edlora.hub import repo_name

    pack = _read_pack(source, repo_id)
    if dry_run:
        target = repo_id or repo_name(pack.concepts)
        names = [concept.placeholder for concept in pack.concepts] or _names_of_plain(pack)
        told = {"repo_id": target, "concepts": names, "private": private, "logged_in": get_token() is not None}
        typer.echo(json.dumps(told) if as_json else f"Would push {', '.join(names)} to {target}")
        if get_token() is None:
            tell("Warning: nobody is logged in, so that the Hub would refuse it. Run `hf auth login` first.", "yellow")
        return
    url = pack.push_to_hub(
        repo_id,
        merged=merged,
        license=license,
        private=private or None,
        revision=revision,
        create_pr=create_pr,
        commit_message=message,
    )
    if create_pr and "/discussions/" not in url:
        tell("Warning: nothing has changed, so that no pull request was opened.", "yellow")
    typer.echo(json.dumps({"url": url}) if as_json else f"Pushed to {url}")


def _read_pack(source: str, repo_id: str | None) -> EDLoRA:
    """Read what is to be pushed.

    Raises:
        ConfigurationError: If it was fused from plain LoRAs and its repository is not named.
    """
    from diffusers_mixofshow.edlora import EDLoRA
    from diffusers_mixofshow.fusion.pack import read_plain_pack

    plain = read_plain_pack(source)
    if plain is not None and repo_id is None:
        raise ConfigurationError(
            f"{source} was fused from plain LoRAs, so that there is no concept to name its repository after. Name it: "
            f"mixofshow push {source} user/name."
        )
    return plain or EDLoRA.from_pretrained(source)


def _names_of_plain(pack: EDLoRA) -> list[str]:
    """Names of the plain LoRAs that a pack without concepts was fused from."""
    from diffusers_mixofshow.edlora.fusion_record import find_plain_prompts

    return list(find_plain_prompts(pack.training))
