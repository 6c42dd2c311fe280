"""Download from and upload to the Hugging Face Hub, with retries and readable errors."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import huggingface_hub
from huggingface_hub import CommitOperationAdd, HfApi, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from diffusers_mixofshow.concepts import Concept
from diffusers_mixofshow.errors import ConceptError, EDLoRANotFoundError, HubError, MixOfShowError


REPO_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{16,}|(?<=Bearer )[^\s'\"]+")
_LONGEST_NAME = 96
_LONGEST_ID = 200
_WAITS = (1.0, 3.0)
"""Seconds before each retry after a busy Hub or a broken connection."""
_MOVED_ON = 412
"""HTTP status if the parent of a commit is no longer the last commit of its branch."""
_PASSING = (408, 429)
_BROKEN = frozenset({"NetworkError", "TimeoutException", "RemoteProtocolError"})
"""Names of httpx errors for a broken connection; by name, because the client re-exports them differently."""

_UNREACHED = frozenset({"ConnectError", "ConnectTimeout"})
"""Names of httpx errors that mean that there is no connection at all."""
_PATIENCE = 10.0
"""Timeout in seconds of the request that checks whether the Hub answers."""

_Result = TypeVar("_Result")


def is_repo_id(source: object) -> bool:
    """Whether a source has the form ``user/repo`` and is not an existing path."""
    return (
        isinstance(source, str)
        and len(source) <= _LONGEST_ID
        and REPO_ID.fullmatch(source) is not None
        and not source.endswith(".safetensors")
        and not Path(source).exists()
    )


def repo_name(concepts: Sequence[Concept]) -> str:
    """Name a repository after its concepts: ``edlora-potter``, ``mixofshow-potter-hermione`` for a fused pack.

    Raises:
        ConceptError: If there is no concept to name it after.
    """
    if not concepts:
        raise ConceptError("Without a concept a repository's name cannot be derived; give repo_id='user/name'.")
    names = [concept.name for concept in concepts]
    name = f"edlora-{names[0]}" if len(names) == 1 else f"mixofshow-{'-'.join(names)}"
    if len(name) > _LONGEST_NAME:
        name = f"mixofshow-{len(names)}-concepts-{names[0]}"[:_LONGEST_NAME]
    return re.sub(r"([.-])[.-]+", r"\1", name).strip("-.")  # the Hub forbids "--", "..", and "-" or "." at the ends


def download(
    repo_id: str,
    filename: str,
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Path:
    """Fetch one file of a repository into the cache and return its path there.

    An interrupted download is retried and resumed; incomplete files never enter the cache. If the Hub cannot be
    reached at all, only the cache is used.
    """
    if not local_files_only and not is_reachable():
        path = f"{subfolder}/{filename}" if subfolder else filename
        with _translate_errors(repo_id, revision, token):
            if find_in_cache(repo_id, path, revision=revision, cache_dir=cache_dir) is None:
                raise make_unreachable_error(repo_id)
        local_files_only = True
    with _translate_errors(repo_id, revision, token):
        return _retry(
            lambda: Path(
                HfApi(token=token).hf_hub_download(
                    repo_id,
                    filename,
                    revision=revision,
                    subfolder=subfolder,
                    cache_dir=cache_dir,
                    local_files_only=local_files_only,
                )
            )
        )


def find_in_cache(repo_id: str, filename: str, *, revision: str | None, cache_dir: str | Path | None) -> Path | None:
    """Path of a repository's file in the cache, without asking the Hub; None if it is not there."""
    path = try_to_load_from_cache(repo_id, filename, revision=revision, cache_dir=cache_dir)
    return Path(path) if isinstance(path, str) else None


def commit_of(path: Path) -> str:
    """The commit of a file in the cache; empty for any other file."""
    parts = path.parts
    place = max((i for i, part in enumerate(parts) if part == "snapshots"), default=len(parts))
    commit = parts[place + 1] if place + 1 < len(parts) else ""
    return commit if _COMMIT.fullmatch(commit) else ""


def create(repo_id: str, *, token: str | bool | None, private: bool | None, revision: str | None) -> tuple[str, str]:
    """Create a model repository, and the branch `revision`, unless they exist.

    Returns:
        The full id, prefixed by the user's name if `repo_id` has none, and the URL.

    Raises:
        HubError: If the Hub refuses or cannot be reached.
    """
    if not is_reachable():
        raise HubError(
            f"The Hub cannot be reached at {huggingface_hub.constants.ENDPOINT}, so nothing was sent to {repo_id!r}. "
            "Check the connection, and HF_ENDPOINT if you have set it."
        )
    with _translate_errors(repo_id, None, token):
        api = HfApi(token=token)
        url = _retry(lambda: api.create_repo(repo_id, private=private, exist_ok=True))
        if revision is not None:
            _retry(lambda: api.create_branch(url.repo_id, branch=revision, exist_ok=True))
        return url.repo_id, str(url)


def upload(
    folder: Path,
    repo_id: str,
    *,
    token: str | bool | None,
    revision: str | None,
    message: str,
    create_pr: bool = False,
    prepare: Callable[[str], None] = lambda commit: None,
) -> str:
    """Send all files of a folder in one commit, which is made as a whole or not at all.

    The commit's parent is the commit that `prepare` was given. If somebody else commits meanwhile, the Hub refuses,
    and both are repeated with the new parent, so that no change is lost.

    Args:
        folder: Folder to send.
        repo_id: Repository.
        token: By default the one of ``hf auth login``.
        revision: Branch to commit to; by default ``main``.
        message: Message of the commit.
        create_pr: Propose the commit as a pull request instead.
        prepare: Called with the branch's last commit before every attempt, to update the folder.

    Returns:
        URL of the commit, or of the pull request.
    """
    api = HfApi(token=token)

    def commit() -> str:
        last = str(api.model_info(repo_id, revision=revision).sha)
        prepare(last)
        info = api.create_commit(
            repo_id,
            _list_files(folder),
            commit_message=message,
            revision=revision,
            create_pr=create_pr,
            parent_commit=last,
        )
        return info.pr_url or info.commit_url

    with _translate_errors(repo_id, revision, token):
        # Not retried: if only the response was lost, a retry would open a second pull request.
        return commit() if create_pr else _retry(commit)


def list_files(
    repo_id: str, *, token: str | bool | None, revision: str | None, local_files_only: bool = False
) -> list[str]:
    """Names of all files of a repository, with their folders; empty where only the cache is used, see `download`."""
    if local_files_only or huggingface_hub.constants.HF_HUB_OFFLINE or not is_reachable():
        return []
    with _translate_errors(repo_id, revision, token):
        found = _retry(lambda: HfApi(token=token).model_info(repo_id, revision=revision))
        return [file.rfilename for file in found.siblings or ()]


def read_file(repo_id: str, filename: str, commit: str, *, token: str | bool | None) -> str | None:
    """Text of a small file of a repository at a commit; None if there is no such file."""
    try:
        path = HfApi(token=token).hf_hub_download(repo_id, filename, revision=commit)
    except LocalEntryNotFoundError:
        raise
    except EntryNotFoundError:
        return None
    return Path(path).read_text(encoding="utf-8", errors="replace")


def make_unreachable_error(name: str) -> HubError:
    """Error: a name is neither on disk nor in the cache, and the Hub does not answer."""
    return HubError(
        f"{name!r} is neither on this disk nor in the cache, and the Hub cannot be reached at "
        f"{huggingface_hub.constants.ENDPOINT}. Check the spelling, the connection, and HF_ENDPOINT if it is set."
    )


def is_reachable() -> bool:
    """Whether the Hub's address accepts connections; True in offline mode.

    Without this check, the client would wait for half a minute, once for each of our retries.
    """
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return True
    for wait in (_WAITS[0], 0.0):
        try:
            huggingface_hub.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=_PATIENCE)
        except Exception as error:  # other errors show when the file is requested
            if not {kind.__name__ for kind in type(error).__mro__} & _UNREACHED:
                return True
            time.sleep(wait)
        else:
            return True
    return False


def _list_files(folder: Path) -> list[CommitOperationAdd]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return [CommitOperationAdd(path.relative_to(folder).as_posix(), path) for path in paths]


def _retry(action: Callable[[], _Result]) -> _Result:
    """Retry after temporary failures: a busy server, a broken connection, a new commit on the branch.

    The client retries transfers, but neither requests about repositories nor commits, which must be prepared again.
    """
    for wait in _WAITS:
        try:
            return action()
        except (HTTPError, OSError, RuntimeError) as error:
            if not _is_temporary(_unwrap_cause(error)):
                raise
            time.sleep(wait)
    return action()


def _unwrap_cause(error: Exception) -> Exception:
    """The error itself, or its cause if the client has wrapped it, as it does for uploads of large files."""
    cause = error.__cause__
    return cause if isinstance(error, RuntimeError) and isinstance(cause, HTTPError | OSError) else error


def _is_temporary(error: BaseException | None) -> bool:
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        return status >= 500 or status in (*_PASSING, _MOVED_ON)
    if isinstance(error, LocalEntryNotFoundError):
        return error.__cause__ is not None and _is_temporary(error.__cause__)
    # The client raises a plain OSError for a file that is shorter than announced.
    return type(error) is OSError or any(kind.__name__ in _BROKEN for kind in type(error).__mro__)


@contextmanager
def _translate_errors(repo_id: str, revision: str | None, token: str | bool | None) -> Iterator[None]:
    """Turn the client's errors into ours, which say what to do and never show the token.

    The original error is not chained, because it may quote a malformed token.
    """
    try:
        yield
    except MixOfShowError:
        raise
    except (HTTPError, EntryNotFoundError, HFValidationError, OSError, ValueError) as error:
        raise _make_error(error, repo_id, revision, token) from None
    except RuntimeError as error:
        reason = _unwrap_cause(error)
        if reason is not error:
            raise _make_error(reason, repo_id, revision, token) from None
        # Without a connection, huggingface_hub 1.3 retries with a closed client.
        if "client has been closed" not in str(error):
            raise
        raise _make_error(LocalEntryNotFoundError(str(error)), repo_id, revision, token) from None


def _make_error(error: Exception, repo_id: str, revision: str | None, token: str | bool | None) -> MixOfShowError:
    at = f"{repo_id!r}" + (f" at revision {revision!r}" if revision else "")
    if isinstance(error, LocalEntryNotFoundError) and isinstance(error.__cause__, HfHubHTTPError):
        error = error.__cause__
    if isinstance(error, GatedRepoError):
        return HubError(f"Access to {at} is gated. Accept its terms on the Hub, and log in with `hf auth login`.")
    if isinstance(error, RepositoryNotFoundError | RevisionNotFoundError | EntryNotFoundError):
        return EDLoRANotFoundError(_explain_missing(error, repo_id, revision, at))
    if isinstance(error, HFValidationError):
        return HubError(f"{repo_id!r} is no valid Hub id; expected 'user/name' with letters, digits, '-', '_', '.'.")
    if isinstance(error, OfflineModeIsEnabled):
        return HubError(f"HF_HUB_OFFLINE is set, so the Hub was not asked for {at}. Unset it to push or to fetch.")
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if status in (401, 403):
        return HubError(
            f"The Hub refused access to {at} (HTTP {status}). Log in with `hf auth login`, or set HF_TOKEN to "
            "a token that may do this (writing needs one of role 'write')."
        )
    if status == _MOVED_ON:
        return HubError(f"Others keep committing to {at}, so nothing was sent. Push again later.")
    return HubError(f"The Hub could not serve {at}: {_redact(str(error), token)}")


def _explain_missing(error: Exception, repo_id: str, revision: str | None, at: str) -> str:
    if isinstance(error, RepositoryNotFoundError):
        return (
            f"There is no repository {repo_id!r} on the Hub, or it is private and you are not logged in. "
            "Check the spelling; for a private one log in with `hf auth login`, or set HF_TOKEN."
        )
    if isinstance(error, RevisionNotFoundError):
        return f"The repository {repo_id!r} has no revision {revision!r} (branch, tag or commit)."
    if isinstance(error, LocalEntryNotFoundError):
        return _explain_not_cached(at)
    return (
        f"The repository {at} holds no ED-LoRA (edlora.safetensors). Give the subfolder if it is in one; load "
        "a plain LoRA with load_lora_weights()."
    )


def _explain_not_cached(at: str) -> str:
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return (
            f"{at} is not in the cache, and HF_HUB_OFFLINE is set. Unset it once to fetch the file, or give a folder."
        )
    return (
        f"{at} is not in the cache, and the Hub was not asked or cannot be reached. Check the connection, and whether "
        "local_files_only is set."
    )


def _redact(text: str, token: str | bool | None) -> str:
    """Remove the given token, and anything that looks like one, from a message."""
    secret = token.strip() if isinstance(token, str) else ""
    return _TOKEN.sub("<token>", text.replace(secret, "<token>") if secret else text)
