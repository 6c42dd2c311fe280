"""Open anything that holds a concept or a LoRA: packs of this package and other programs' files, on disk or the Hub.

`load_edlora`, `GradientFuser.fuse` and the command line open their sources here.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from diffusers_mixofshow.edlora import EDLoRA, hub
from diffusers_mixofshow.edlora.file import FILE_NAME, PLAIN_NAME
from diffusers_mixofshow.edlora.fusion_record import find_plain_prompts
from diffusers_mixofshow.edlora.merged import INDEX, has_concepts
from diffusers_mixofshow.edlora.reading import identity, read_metadata, within
from diffusers_mixofshow.errors import ConfigurationError, EDLoRANotFoundError, warn
from diffusers_mixofshow.interop.concept_names import UNKNOWN_CLASS, Naming, distinct_names
from diffusers_mixofshow.interop.foreign import FOREIGN_NAMES, Foreign, read_foreign, to_edlora
from diffusers_mixofshow.interop.lora_files import EMBEDDINGS, list_companions
from diffusers_mixofshow.interop.peft_settings import PEFT_CONFIG
from diffusers_mixofshow.interop.trigger_words import find_trigger_words


_OF_PEFT = "adapter_model"
_OF_ADVANCED_SCRIPTS = "*_emb.safetensors"


@dataclass(frozen=True, kw_only=True)
class Opened:
    """An opened source, as an ED-LoRA.

    Args:
        edlora: Without concepts for a plain LoRA, without updates for a textual inversion.
        file: The file that it was read from; the first of several.
        foreign: Content of another program's file; None for a pack of this package.
        remarks: Defaults assumed for what the file does not contain, each as a sentence; see `tell`.
    """

    edlora: EDLoRA
    file: Path
    foreign: Foreign | None = None
    remarks: tuple[str, ...] = ()

    @cached_property
    def trigger_words(self) -> tuple[str, ...]:
        """Trigger words of a plain LoRA in its file's metadata; may be empty."""
        return () if self.foreign is None else find_trigger_words(self.foreign.metadata)

    @cached_property
    def members(self) -> dict[str, list[str]]:
        """Plain LoRAs that a pack was fused from, with their prompts, in the pack's untrusted record; else empty."""
        return find_plain_prompts(self.edlora.training)

    @property
    def tells_prompts(self) -> bool:
        """Whether the file of a plain LoRA tells what to record it with: prompts of all members, or trigger words."""
        return bool(self.trigger_words or (self.members and all(self.members.values())))

    def tell(self) -> None:
        """Issue the remarks as warnings."""
        for remark in self.remarks:
            warn(f"{self.file}: {remark}.")


def open_edlora(source: str | os.PathLike[str], *, layers: tuple[str, ...] = (), **where: Any) -> Opened:
    """Read a pack of this package, or any file of another program that `mixofshow inspect` understands.

    Args:
        source: A file, a folder or a Hub id; an existing path has priority.
        layers: Cross-attention layers of the base it will be used with, if known.
        where: See `read_any`.

    Raises:
        EDLoRANotFoundError: If there is no such file.
        EDLoRAFormatError: If it is defective or cannot be converted; lists every defect.
        ConfigurationError: If it is a complete pipeline.
        HubError: If the Hub refuses or cannot be reached.
    """
    file, found = _read(source, **where)
    if isinstance(found, EDLoRA):
        if file.name == FILE_NAME and has_concepts(file.parent):
            raise _pipeline_error(file.parent)
        return Opened(edlora=found, file=file)
    counts = {len(rows) for rows in found.tokens.values()} - {1}
    edlora = to_edlora(found, Naming(), layers if counts <= {len(layers)} else ())
    return Opened(edlora=edlora, file=found.files[0], foreign=found, remarks=_remarks(edlora))


def read_any(source: str | os.PathLike[str], **where: Any) -> EDLoRA | Foreign:
    """Read what `open_edlora` reads, but return the content of another program's file unconverted, with its defects.

    Args:
        source: A file, a folder or a Hub id.
        where: `revision`, `subfolder`, `token`, `cache_dir` and `local_files_only`, see `EDLoRA.from_pretrained`;
            `weight_name`, the name of the file inside a folder or repository, if it is not a usual one.

    Raises:
        MixOfShowError: See `open_edlora`.
    """
    return _read(source, **where)[1]


def choose_file(names: Collection[str]) -> str | None:
    """The file of a repository that `open_edlora` reads, of the names of all its files; None if there is none."""
    return next((name for name in (FILE_NAME, *FOREIGN_NAMES) if name in names), None)


def is_ours(path: Path) -> bool:
    """Whether a file or folder is an ED-LoRA of this package, valid or not."""
    if path.is_dir():
        return (path / FILE_NAME).exists()
    return path.name == FILE_NAME or "edlora" in read_metadata(path)


def _read(
    source: str | os.PathLike[str], *, weight_name: str | None = None, subfolder: str | None = None, **where: Any
) -> tuple[Path, EDLoRA | Foreign]:
    """Read a source; returns the file and its content."""
    if hub.is_repo_id(source):
        return _read_from_hub(str(source), weight_name, subfolder, where)
    path = Path(source)
    if os.path.isdir(path):  # False, too, for what is too long to be a path
        path = within(path, *(name for name in (subfolder, weight_name) if name))
        if (path / INDEX).is_file() and not is_ours(path):
            raise _pipeline_error(path)
    elif subfolder:
        path /= subfolder
    if identity(path) is not None and not is_ours(path):
        found = read_foreign(path)
        return found.files[0], found
    return (path / FILE_NAME if os.path.isdir(path) else path), EDLoRA.from_pretrained(path)


def _read_from_hub(
    repo_id: str, weight_name: str | None, subfolder: str | None, where: dict[str, Any]
) -> tuple[Path, EDLoRA | Foreign]:
    """Read a repository's pack; without one, the given file or the first of `FOREIGN_NAMES`."""
    if weight_name is None:
        try:
            file = _fetch(repo_id, FILE_NAME, subfolder, where)
            return file, EDLoRA.from_pretrained(file)
        except EDLoRANotFoundError as error:
            missing = error
    else:
        missing = EDLoRANotFoundError(f"The repository {repo_id!r} holds no {weight_name}.")
    for name in FOREIGN_NAMES if weight_name is None else (weight_name,):
        try:
            file = _fetch(repo_id, name, subfolder, where)
        except EDLoRANotFoundError:
            continue
        if is_ours(file):
            return file, EDLoRA.from_pretrained(file)
        is_usual = weight_name is None and name == PLAIN_NAME
        return file, read_foreign(file, _fetch_embeddings(repo_id, file.parent, subfolder, where) if is_usual else ())
    raise missing


def _fetch(repo_id: str, name: str, subfolder: str | None, where: dict[str, Any]) -> Path:
    """Download a file of a repository, PEFT's settings if it is PEFT's, and the embeddings written beside it."""
    file = hub.download(repo_id, name, subfolder=subfolder, **where)
    words = distinct_names(list_companions(read_metadata(file))).values()
    beside = [f"{EMBEDDINGS}/{word}.safetensors" for word in words]
    for needed in [PEFT_CONFIG, *beside] if name.startswith(_OF_PEFT) else beside:
        with suppress(EDLoRANotFoundError):  # the reader reports what is missing
            hub.download(repo_id, needed, subfolder=subfolder, **where)
    return file


def _fetch_embeddings(repo_id: str, folder: Path, subfolder: str | None, where: dict[str, Any]) -> list[Path]:
    """Download the embeddings that diffusers' advanced training scripts put beside a LoRA; returns those there."""
    asked = {"token": None, "revision": None} | where
    asked.pop("cache_dir", None)
    for path in map(PurePosixPath, hub.list_files(repo_id, **asked)):
        if path.parent == PurePosixPath(subfolder or "") and path.match(_OF_ADVANCED_SCRIPTS):
            hub.download(repo_id, path.name, subfolder=subfolder, **where)
    return sorted(folder.glob(_OF_ADVANCED_SCRIPTS))


def _pipeline_error(folder: Path) -> ConfigurationError:
    """Error: the source is a complete pipeline, not a pack."""
    return ConfigurationError(
        f"{folder} is a complete pipeline, whose updates are in its weights. Load it as a pipeline, "
        f"MixOfShowPipeline.from_pretrained({str(folder)!r}), or on the command line with --base {folder}."
    )


def _remarks(edlora: EDLoRA) -> tuple[str, ...]:
    """Defaults assumed for what the file does not contain."""
    unknown = [concept.placeholder for concept in edlora.concepts if concept.class_word == UNKNOWN_CLASS]
    if not unknown:
        return ()
    return (
        f"it has no class word for {', '.join(unknown)}; {UNKNOWN_CLASS!r} and kind 'object' are assumed. Set them "
        "with read_as_edlora(file, class_word=..., kind=...) or `mixofshow convert`",
    )
