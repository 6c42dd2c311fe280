"""Download a data set of photos from the Hugging Face Hub into its cache."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)

from diffusers_mixofshow.errors import HubError
from diffusers_mixofshow.pictures import PICTURE_SUFFIXES
from diffusers_mixofshow.training.captions import METADATA_FILES
from diffusers_mixofshow.training.folders import CAPTION_SUFFIXES


_ENDINGS = (*PICTURE_SUFFIXES, *CAPTION_SUFFIXES, ".json", *METADATA_FILES)
_WANTED = ["*" + "".join(f"[{letter}{letter.upper()}]" for letter in ending) for ending in _ENDINGS]
"""Patterns of pictures, captions and metadata, in any case; code and archives of a data set are never downloaded."""


def fetch_data_set(name: str) -> Path:
    """Download a data set in the imagefolder layout and return the folder of its files.

    Args:
        name: ``user/name`` on the Hub.

    Raises:
        HubError: If it does not exist, may not be read, or the Hub cannot be reached.
    """
    try:
        return Path(snapshot_download(name, repo_type="dataset", allow_patterns=_WANTED))
    except GatedRepoError:
        reason = "access to it is gated; accept its terms on the Hub and log in with `hf auth login`"
    except RepositoryNotFoundError:
        reason = "there is none of this name, or it is private; check the spelling, log in with `hf auth login`"
    except HFValidationError:
        reason = "expected the form user/name"
    except LocalEntryNotFoundError:
        reason = "it is not in the cache, and the Hub was not reached; check the connection and HF_HUB_OFFLINE"
    except (HTTPError, OSError) as error:
        reason = str(error)
    raise HubError(f"The data set {name!r} cannot be fetched from the Hub: {reason}.")
