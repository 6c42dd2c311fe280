"""State of the page: each user's loaded packs, and the base model that users share and use one at a time."""

from __future__ import annotations

import functools
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from diffusers_mixofshow.base_models import name_of
from diffusers_mixofshow.concepts import check_distinct
from diffusers_mixofshow.edlora import hub
from diffusers_mixofshow.errors import ConfigurationError
from diffusers_mixofshow.sampling.loading import load_base


if TYPE_CHECKING:
    from diffusers_mixofshow import Concept, EDLoRA
    from diffusers_mixofshow.interop.opening import Opened

MOST_PACKS = 16
"""Packs that one user may have loaded at once."""
_KEPT = 600
"""Seconds for which a folder of results is kept."""


@dataclass(frozen=True, kw_only=True)
class Session:
    """The packs that one user has loaded, which other users do not see.

    Args:
        packs: Name to pack.
    """

    packs: Mapping[str, EDLoRA] = field(default_factory=lambda: MappingProxyType({}))

    @property
    def concepts(self) -> list[Concept]:
        """The concepts that prompts may name."""
        return [concept for pack in self.packs.values() for concept in pack.concepts]

    def with_pack(self, name: str, pack: EDLoRA) -> Session:
        """Return the session with one more pack, which replaces one of the same name.

        Raises:
            ConceptError: If a concept's name is taken by another pack.
            ConfigurationError: If there are too many packs.
        """
        packs = {**self.packs, name: pack}
        if len(packs) > MOST_PACKS:
            raise ConfigurationError(f"{MOST_PACKS} packs are loaded, which is all that fit. Unload one first.")
        check_distinct(concept for each in packs.values() for concept in each.concepts)
        return replace(self, packs=MappingProxyType(packs))

    def without_pack(self, name: str) -> Session:
        """Return the session without a pack, whether or not it was there."""
        return replace(self, packs=MappingProxyType({key: pack for key, pack in self.packs.items() if key != name}))

    def without_concepts(self, concepts: Sequence[Concept]) -> Session:
        """Return the session without the packs that hold a concept of one of these names."""
        names = {concept.placeholder for concept in concepts}
        held = [key for key, pack in self.packs.items() for concept in pack.concepts if concept.placeholder in names]
        return functools.reduce(Session.without_pack, held, self)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the packs as a dict, since mapping proxies cannot be; Spaces run GPU calls in another process."""
        return _make_session, (dict(self.packs),)


def _make_session(packs: dict[str, EDLoRA]) -> Session:
    return Session(packs=MappingProxyType(packs))


@dataclass(frozen=True)
class Studio:
    """The base model and the results, which all users of the page share.

    Args:
        base: The base model: a Hub id, a folder, or ``toyland``.
        device: Where to draw; None for the GPU where there is one.
        dtype: Name of the weights' type; None for the device's default.
        local: Whether users may name folders of this machine.
    """

    base: str
    device: str | None = None
    dtype: str | None = None
    local: bool = True
    _turn: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False)
    _results: TemporaryDirectory[str] = field(
        default_factory=lambda: TemporaryDirectory(prefix="mixofshow-"), init=False, repr=False
    )

    @functools.cached_property
    def pipe(self) -> Any:
        """The base model, loaded at its first use."""
        return load_base(self.base, self.device, self.dtype)

    @contextmanager
    def borrow(self) -> Iterator[Any]:
        """Reserve the base model for one user, who must unload again what is loaded inside the block."""
        with self._turn:
            yield self.pipe

    def new_folder(self) -> Path:
        """Make a folder for files that Gradio copies at once; old folders are deleted, and all when the page ends."""
        for folder in Path(self._results.name).iterdir():
            if time.time() - folder.stat().st_mtime > _KEPT:
                shutil.rmtree(folder, ignore_errors=True)
        return Path(tempfile.mkdtemp(dir=self._results.name))

    @property
    def base_name(self) -> str:
        """Name of the loaded base model."""
        return name_of(self.pipe) or self.base

    def open(self, source: str | Path) -> Opened:
        """Read a file that a user has uploaded or named.

        Args:
            source: Path of an uploaded file, or a text that was typed: a Hub id or, if the page is local, a folder or
                file of this machine.

        Raises:
            MixOfShowError: If it cannot be read; see `open_edlora`.
        """
        from diffusers_mixofshow.interop.opening import open_edlora

        if isinstance(source, str):
            self._refuse_places(source)
        return open_edlora(source)

    def _refuse_places(self, text: str) -> None:
        if not text:
            raise ConfigurationError("Got no name. Type a Hub id such as user/edlora-potter, or drop a file.")
        if not self.local and not hub.is_repo_id(text):
            raise ConfigurationError(
                f"{text!r} is no Hub id such as user/edlora-potter. Folders of this machine can be named only where "
                "the page is open to its own user alone; drop a file instead."
            )
