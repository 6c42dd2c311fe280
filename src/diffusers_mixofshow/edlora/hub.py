"""ED-LoRAs on the Hugging Face Hub: where they are fetched from and sent to."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from diffusers_mixofshow.concepts import Concept
from diffusers_mixofshow.errors import EDLoRANotFoundError, HubError, MixOfShowError


_REPO_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_LONGEST_NAME = 96


def is_repo_id(source: object) -> bool:
    """Whether a source has the form ``user/repo`` and is nothing on this disk's file system."""
    return (
        isinstance(source, str)
        and _REPO_ID.fullmatch(source) is not None
        and not source.endswith(".safetensors")
        and not Path(source).exists()
    )


def repo_name(concepts: Sequence[Concept]) -> str:
    """Name a repository after its concepts: ``edlora-potter``, ``mixofshow-potter-hermione`` for a fused pack."""
    names = [concept.name for concept in concepts]
    name = f"edlora-{names[0]}" if len(names) == 1 else f"mixofshow-{'-'.join(names)}"
    if len(name) > _LONGEST_NAME:
        name = f"mixofshow-{len(names)}-concepts-{names[0]}"[:_LONGEST_NAME]
    return re.sub(r"([.-])[.-]+", r"\1", name).strip("-.")  # the Hub forbids "--", ".." and these at the ends


def download(
    repo_id: str,
    filename: str,
    *,
    revision: str | None,
    subfolder: str | None,
    token: str | bool | None,
    cache_dir: str | Path | None,
    local_files_only: bool,
) -> Path:
    """Fetch one file of a repository into the cache and return its path there."""
    with _explained(repo_id, revision, token):
        return Path(
            HfApi(token=token).hf_hub_download(
                repo_id,
                filename,
                revision=revision,
                subfolder=subfolder,
                cache_dir=cache_dir,
                local_files_only=local_files_only,
            )
        )


def cached(repo_id: str, filename: str, *, revision: str | None, cache_dir: str | Path | None) -> Path | None:
    """Path of a repository's file in the cache, without asking the Hub; None if it is not there."""
    path = try_to_load_from_cache(repo_id, filename, revision=revision, cache_dir=cache_dir)
    return Path(path) if isinstance(path, str) else None


def create(repo_id: str, *, token: str | bool | None, private: bool | None, revision: str | None) -> tuple[str, str]:
    """Create a model repository, and the branch `revision`, unless they exist.

    Returns:
        The full id, with the user's own name in front where `repo_id` has none, and the URL.
    """
    with _explained(repo_id, None, token):
        api = HfApi(token=token)
        url = api.create_repo(repo_id, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(url.repo_id, branch=revision, exist_ok=True)
        return url.repo_id, str(url)


def upload(folder: Path, repo_id: str, *, token: str | bool | None, revision: str | None, message: str) -> None:
    """Send all files of a folder in one commit."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    files = [CommitOperationAdd(path.relative_to(folder).as_posix(), path) for path in paths]
    with _explained(repo_id, revision, token):
        HfApi(token=token).create_commit(repo_id, files, commit_message=message, revision=revision)


@contextmanager
def _explained(repo_id: str, revision: str | None, token: str | bool | None) -> Iterator[None]:
    """Turn the client's errors into ours, which say what to do and never show the token.

    The client's own error is not chained: a malformed token is quoted in it.
    """
    try:
        yield
    except (HTTPError, EntryNotFoundError, HFValidationError, OSError, ValueError) as error:
        raise _explanation(error, repo_id, revision, token) from None
    except RuntimeError as error:
        # Where nothing answers, huggingface_hub 1.3 retries with a client that it has closed.
        if "client has been closed" not in str(error):
            raise
        raise _explanation(LocalEntryNotFoundError(str(error)), repo_id, revision, token) from None


def _explanation(error: Exception, repo_id: str, revision: str | None, token: str | bool | None) -> MixOfShowError:
    at = f"{repo_id!r}" + (f" at revision {revision!r}" if revision else "")
    if isinstance(error, GatedRepoError):
        return HubError(f"Access to {at} is gated. Accept its terms on the Hub, and log in with `hf auth login`.")
    if isinstance(error, RepositoryNotFoundError):
        return EDLoRANotFoundError(
            f"There is no repository {repo_id!r} on the Hub, or it is private and you are not logged in. "
            "Check the spelling; for a private one log in with `hf auth login` or pass token=...."
        )
    if isinstance(error, RevisionNotFoundError):
        return EDLoRANotFoundError(f"The repository {repo_id!r} has no revision {revision!r} (branch, tag or commit).")
    if isinstance(error, LocalEntryNotFoundError):
        return EDLoRANotFoundError(
            f"{at} is not in the cache and the Hub was not asked or not reached. Check the connection, and "
            "whether local_files_only or HF_HUB_OFFLINE is set."
        )
    if isinstance(error, EntryNotFoundError):
        return EDLoRANotFoundError(
            f"The repository {at} holds no ED-LoRA (edlora.safetensors). Give the subfolder if it is in one; load "
            "an ordinary LoRA with load_lora_weights()."
        )
    if isinstance(error, HFValidationError):
        return HubError(f"{repo_id!r} is no valid Hub id; expected 'user/name' with letters, digits, '-', '_', '.'.")
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if status in (401, 403):
        return HubError(
            f"The Hub refused access to {at} (HTTP {status}). Log in with `hf auth login`, or pass a token that "
            "may do this (writing needs a token of role 'write')."
        )
    return HubError(f"The Hub could not serve {at}: {_without(str(error), token)}")


def _without(text: str, token: str | bool | None) -> str:
    secret = token.strip() if isinstance(token, str) else ""
    return text.replace(secret, "<token>") if secret else text
