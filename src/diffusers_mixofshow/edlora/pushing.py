"""Push a folder to the Hub and refresh its model card."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from huggingface_hub import ModelCard

from diffusers_mixofshow.atomic import write_whole
from diffusers_mixofshow.edlora import hub
from diffusers_mixofshow.edlora.card import CARD_NAME, refresh_text
from diffusers_mixofshow.errors import ConfigurationError


def push(
    folder: Path,
    repo_id: str,
    card_for: Callable[[str], ModelCard] | None,
    *,
    token: str | bool | None,
    private: bool | None,
    revision: str | None,
    create_pr: bool,
    message: str,
) -> str:
    """Send a folder in one commit; creates the repository where it is missing.

    Args:
        folder: Folder to send; its README.md is written here.
        repo_id: ``user/name``, or a name under the user's own account.
        card_for: Makes the card for a full repository id; None to send the folder unchanged.
        token: By default the one of ``hf auth login``.
        private: Whether a new repository is private; by default the account's setting.
        revision: Branch to commit to, created where it is missing; by default ``main``.
        create_pr: Open a pull request instead.
        message: Message of the commit.

    Returns:
        The repository's URL, or the pull request's.

    Raises:
        ConfigurationError: If both a pull request and a branch are given, which the Hub does not support.
        HubError: If the Hub refuses or cannot be reached; nothing of the folder is sent then.
    """
    if create_pr and revision not in (None, "main"):
        raise ConfigurationError(f"Pull requests go to main; give create_pr or revision={revision!r}, not both.")
    repo_id, url = hub.create(repo_id, token=token, private=private, revision=None if create_pr else revision)

    def renew_card(commit: str) -> None:
        if card_for is not None:
            there = hub.read_file(repo_id, CARD_NAME, commit, token=token)
            write_whole(folder / CARD_NAME, refresh_text(there, card_for(repo_id)).encode())

    commit_url = hub.upload(
        folder,
        repo_id,
        token=token,
        revision=revision,
        message=message,
        create_pr=create_pr,
        prepare=renew_card,
    )
    return commit_url if create_pr else url
