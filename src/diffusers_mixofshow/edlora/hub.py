"""ED-LoRAs on the Hugging Face Hub: where they are fetched from and sent to."""

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


_REPO_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{16,}|(?<=Bearer )[^\s'\"]+")
_LONGEST_NAME = 96
_LONGEST_ID = 200
_WAITS = (1.0, 3.0)
"""Seconds before each further try of what a Hub under load, or a connection that broke, refused."""
_MOVED_ON = 412
"""Status of a commit on top of one that is no longer the branch's last."""
_PASSING = (408, 429)
_BROKEN = frozenset({"NetworkError", "TimeoutException", "RemoteProtocolError"})
"""Errors of httpx, which the client imports under one name or another."""

_UNREACHED = frozenset({"ConnectError", "ConnectTimeout"})
"""Errors of httpx that mean that there is no connection at all."""
_PATIENCE = 10.0
"""Timeout in seconds of the request that checks whether the Hub answers."""

_Result = TypeVar("_Result")


def is_repo_id(source: object) -> bool:
    """Whether a source has the form ``user/repo`` and is nothing on this disk's file system."""
    return (
        isinstance(source, str)
        and len(source) <= _LONGEST_ID
        and _REPO_ID.fullmatch(source) is not None
        and not source.endswith(".safetensors")
        and not Path(source).exists()
    )


def repo_name(concepts: Sequence[Concept]) -> str:
    """Name a repository after its concepts: ``edlora-potter``, ``mixofshow-potter-hermione`` for a fused pack.

    Raises:
        ConceptError: If there is no concept to name it after.
    """
    if not concepts:
        raise ConceptError(
            "Without a concept there is no name to derive a repository's from; give repo_id='user/name'."
        )
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
    """Fetch one file of a repository into the cache and return its path there.

    What breaks off is tried again and goes on where it stopped; a file that did not arrive whole is not in the cache.
    Where there is no way to the Hub at all, the cache is asked alone.
    """
    if not local_files_only and not answers():
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
    """The commit that a file in the cache belongs to; empty of a file anywhere else."""
    parts = path.parts
    place = max((i for i, part in enumerate(parts) if part == "snapshots"), default=len(parts))
    commit = parts[place + 1] if place + 1 < len(parts) else ""
    return commit if _COMMIT.fullmatch(commit) else ""


def create(repo_id: str, *, token: str | bool | None, private: bool | None, revision: str | None) -> tuple[str, str]:
    """Create a model repository, and the branch `revision`, unless they exist.

    Returns:
        The full id, with the user's own name in front where `repo_id` has none, and the URL.

    Raises:
        HubError: If the Hub refuses or cannot be reached.
    """
    if not answers():
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

    The commit goes on top of the one that `prepare` saw: if somebody else was faster, it sees theirs and the commit is
    tried anew, so that nothing of theirs is undone.

    Args:
        folder: What to send.
        repo_id: Where to.
        token: By default the one of ``hf auth login``.
        revision: Branch to commit to; by default ``main``.
        message: Of the commit.
        create_pr: Propose the commit as a pull request instead.
        prepare: Called with the branch's last commit before every try, to bring the folder up to date with it.

    Returns:
        URL of the commit, or of the pull request.
    """
    api = HfApi(token=token)

    def commit() -> str:
        last = str(api.model_info(repo_id, revision=revision).sha)
        prepare(last)
        info = api.create_commit(
            repo_id,
            _files(folder),
            commit_message=message,
            revision=revision,
            create_pr=create_pr,
            parent_commit=last,
        )
        return info.pr_url or info.commit_url

    with _translate_errors(repo_id, revision, token):
        # A second try of a pull request whose answer was lost would be a second pull request.
        return commit() if create_pr else _retry(commit)


def text_at(repo_id: str, filename: str, commit: str, *, token: str | bool | None) -> str | None:
    """A small text file of a repository at a commit; None if it has none."""
    try:
        path = HfApi(token=token).hf_hub_download(repo_id, filename, revision=commit)
    except LocalEntryNotFoundError:
        raise
    except EntryNotFoundError:
        return None
    return Path(path).read_text(encoding="utf-8", errors="replace")


def make_unreachable_error(name: str) -> HubError:
    """The error of what only the Hub could give, where that does not answer."""
    return HubError(
        f"{name!r} is neither on this disk nor in the cache, and the Hub cannot be reached at "
        f"{huggingface_hub.constants.ENDPOINT}. Check the spelling, the connection, and HF_ENDPOINT if it is set."
    )


def answers() -> bool:
    """Whether anything takes a connection at the Hub's address; True in offline mode.

    The client itself would try for half a minute, and again for every try of ours.
    """
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return True
    for wait in (_WAITS[0], 0.0):
        try:
            huggingface_hub.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=_PATIENCE)
        except Exception as error:  # whatever else is wrong shows when the file is asked for
            if not {kind.__name__ for kind in type(error).__mro__} & _UNREACHED:
                return True
            time.sleep(wait)
        else:
            return True
    return False


def _files(folder: Path) -> list[CommitOperationAdd]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return [CommitOperationAdd(path.relative_to(folder).as_posix(), path) for path in paths]


def _retry(action: Callable[[], _Result]) -> _Result:
    """Try again what failed for a reason that passes: a busy server, a broken connection, a branch that moved on.

    The client itself repeats transfers, but not requests for and about repositories, nor a commit on a branch that
    moved on, which has to be prepared anew.
    """
    for wait in _WAITS:
        try:
            return action()
        except (HTTPError, OSError, RuntimeError) as error:
            if not _passes(_reason(error)):
                raise
            time.sleep(wait)
    return action()


def _reason(error: Exception) -> Exception:
    """The error itself, or for a large file that did not get through the one that the client hides behind its own."""
    cause = error.__cause__
    return cause if isinstance(error, RuntimeError) and isinstance(cause, HTTPError | OSError) else error


def _passes(error: BaseException | None) -> bool:
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        return status >= 500 or status in (*_PASSING, _MOVED_ON)
    if isinstance(error, LocalEntryNotFoundError):
        return error.__cause__ is not None and _passes(error.__cause__)
    # Of the client's own, a file that is shorter than announced is a plain OSError.
    return type(error) is OSError or any(kind.__name__ in _BROKEN for kind in type(error).__mro__)


@contextmanager
def _translate_errors(repo_id: str, revision: str | None, token: str | bool | None) -> Iterator[None]:
    """Turn the client's errors into ours, which say what to do and never show the token.

    The client's own error is not chained: a malformed token is quoted in it.
    """
    try:
        yield
    except MixOfShowError:
        raise
    except (HTTPError, EntryNotFoundError, HFValidationError, OSError, ValueError) as error:
        raise _explanation(error, repo_id, revision, token) from None
    except RuntimeError as error:
        reason = _reason(error)
        if reason is not error:
            raise _explanation(reason, repo_id, revision, token) from None
        # Where nothing answers, huggingface_hub 1.3 retries with a client that it has closed.
        if "client has been closed" not in str(error):
            raise
        raise _explanation(LocalEntryNotFoundError(str(error)), repo_id, revision, token) from None


def _explanation(error: Exception, repo_id: str, revision: str | None, token: str | bool | None) -> MixOfShowError:
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
        return HubError(f"Others keep committing to {at}, so that nothing was sent. Push again when they are done.")
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
        "an ordinary LoRA with load_lora_weights()."
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
    """A message without the token that was given, and without anything that looks like one."""
    secret = token.strip() if isinstance(token, str) else ""
    return _TOKEN.sub("<token>", text.replace(secret, "<token>") if secret else text)
