"""Fusion statistics as a file beside an ED-LoRA, so that others can fuse it without a model and without a GPU.

One safetensors file a source. Tensors: ``<placeholder>|<part>|<input>|gram``, float32, (in_features, in_features); or,
for wide layers and small files, a low-rank factor: ``...|rows``, float16, (kept, in_features), each row divided by its
entry of ``...|scale``, float32, (kept,). Header metadata: one JSON string under
``edlora_statistics``.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from numbers import Integral
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save as serialize

from diffusers_mixofshow.atomic import check_outputs, write_whole
from diffusers_mixofshow.edlora.defects import WIDEST, list_names, sanitise
from diffusers_mixofshow.edlora.file import FILE_NAME, PLAIN_NAME, STATISTICS_KEY
from diffusers_mixofshow.edlora.folder import statistics_name
from diffusers_mixofshow.edlora.header import decode
from diffusers_mixofshow.edlora.hub import create, list_files, upload
from diffusers_mixofshow.edlora.reading import read_steadily
from diffusers_mixofshow.errors import EDLoRAFormatError, EDLoRANotFoundError, FusionError
from diffusers_mixofshow.fusion.compression import Spectrum, allocate_ranks, most_rows
from diffusers_mixofshow.fusion.gram import DenseGram, Gram, GramFactor
from diffusers_mixofshow.fusion.statistics import PARTS, GramStatistics, Part
from diffusers_mixofshow.interop.opening import choose_file


FORMAT_VERSION = 1
DEFAULT_BYTES = 10_000_000
"""Smallest automatic size of a concept's low-rank factors: 62 directions for each input of SD 1.5."""
_BYTES_A_FEATURE = 124
"""The same 62 directions in float16, for bases whose inputs add up to more features."""

MaxBytes = int | Literal["auto"] | None

_LARGEST = 2.0**63
"""Upper bound for numbers in a header; a comparison with it also rejects NaN and Inf."""
_REMEDY = "Record it again with GradientFuser(pipe, sequential=False), or ask its author for another copy."
_UPDATE = "Update diffusers-mixofshow, or move the file away and record anew."


class DamagedStatisticsError(FusionError):
    """A file holds no statistics or contradicts itself. The only argument is the defect; `str` adds the remedy."""

    def __str__(self) -> str:
        """The defect and its remedy."""
        return f"{self.args[0]}. {_REMEDY}"


def statistics_path(lora_file: Path) -> Path:
    """Where statistics are kept: ``edlora.statistics.safetensors`` beside ``edlora.safetensors``."""
    return lora_file.with_name(statistics_name(lora_file.name))


Shapes = Mapping[str, tuple[int, ...]]
"""Tensor name to shape."""


@dataclass(frozen=True, kw_only=True)
class SourceStatistics:
    """Statistics that a source publishes beside its LoRA: the Gram matrices of each of its concepts.

    Args:
        digest: `EDLoRA.digest` of the LoRA that the concepts were sampled with.
        base_model: Id of the model they were sampled on.
        recording: How they were sampled, JSON values only: prompts by placeholder, seeds, steps, sampler, guidance.
        concepts: Statistics by placeholder.
        file: Where they were read from; None if just recorded.
        fingerprint: Hash of that file's header.
    """

    digest: str
    base_model: str
    recording: Mapping[str, Any]
    concepts: Mapping[str, GramStatistics]
    file: Path | None = None
    fingerprint: str = ""

    def save(self, path: str | os.PathLike[str], *, max_bytes: MaxBytes = "auto", overwrite: bool = False) -> Path:
        """Write the statistics; the file appears whole or not at all.

        Args:
            path: The file, see `statistics_path`.
            max_bytes: Size of one concept's low-rank factors; None writes the matrices in full, as float32, except
                those of wide layers, which are sketched. ``auto`` is 10 MB, and more for bases wider than SD 1.5.
            overwrite: Replace a file that exists.

        Raises:
            OverwriteError: If the file exists.
            FusionError: If a matrix holds NaN or Inf; nothing is written then.
            FileWriteError: If it cannot be written.
        """
        path = Path(path)
        check_outputs(path, overwrite=overwrite)
        write_whole(path, self.to_bytes(max_bytes))
        return path

    def to_bytes(self, max_bytes: MaxBytes, dtype: torch.dtype = torch.float32) -> bytes:
        """Bytes of the file that `save` writes.

        Args:
            max_bytes: See `save`.
            dtype: Dtype of full matrices.

        Raises:
            FusionError: If a matrix holds NaN or Inf, or `max_bytes` is no size.
        """
        refuse_other_sizes(max_bytes)
        tensors: dict[str, torch.Tensor] = {}
        entries: dict[str, Any] = {}
        for placeholder, statistics in self.concepts.items():
            written, entries[placeholder] = _write_concept(placeholder, statistics, max_bytes, dtype)
            tensors |= written
        header = {
            "format_version": FORMAT_VERSION,
            "source": self.digest,
            "base_model": self.base_model,
            "recording": dict(self.recording),
            "form": "full" if max_bytes is None else "low-rank",
            "concepts": entries,
        }
        return serialize(tensors, metadata={"format": "pt", STATISTICS_KEY: json.dumps(header)})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SourceStatistics:
        """Read the header of a file; each matrix is read when it is used.

        Raises:
            DamagedStatisticsError: If it is not a file of statistics, or contradicts itself; names the defects.
            FusionError: If a newer release wrote it.
        """
        path = Path(path)
        header, shapes, fingerprint = _open_file(path)
        concepts = {}
        for placeholder, entry in header["concepts"].items():
            numbers = _check_entry(path, entry)
            in_full = {
                (name, part)  # wide inputs always have a low-rank factor
                for name, part in numbers
                if header["form"] == "full" and _tensor_name(placeholder, part, name, "rows") not in shapes
            }
            concepts[placeholder] = StoredStatistics(path, fingerprint, placeholder, numbers, in_full)
        names, expected = shapes.keys(), {name for concept in concepts.values() for name in concept.tensor_names()}
        if expected != names:
            raise DamagedStatisticsError(
                f"{path}: its header and its tensors differ: {len(expected - names)} missing, "
                f"{len(names - expected)} unexpected"
            )
        if wrong := [name for concept in concepts.values() for name in concept.find_shape_defects(shapes)]:
            raise DamagedStatisticsError(f"{path}: tensors of another shape: {list_names(wrong)}")
        return cls(
            digest=header["source"],
            base_model=header["base_model"],
            recording=header["recording"],
            concepts=concepts,
            file=path,
            fingerprint=fingerprint,
        )

    def copy(self, path: Path) -> None:
        """Write the same statistics elsewhere, replacing any file; bit for bit if they come from a file.

        Raises:
            FusionError: If the file was deleted, damaged or replaced by other statistics since it was loaded.
        """
        if self.file is None:
            self.save(path, overwrite=True)
        elif self.file.resolve() != path.resolve():
            write_whole(path, _read_bytes(self.file, self.fingerprint))

    def push_to_hub(self, repo_id: str, *, token: str | bool | None = None, revision: str | None = None) -> None:
        """Upload the statistics beside the ED-LoRA or plain LoRA of a repository, created where it is missing.

        Args:
            repo_id: Repository of the LoRA, see `EDLoRA.push_to_hub`.
            token: By default the one of ``hf auth login``.
            revision: Branch to commit to; by default ``main``.

        Raises:
            HubError: If the Hub refuses or cannot be reached.
        """
        with tempfile.TemporaryDirectory() as folder:
            written = Path(folder, "statistics")
            self.copy(written)  # first, so that errors are raised before the repository is created
            repo_id, _ = create(repo_id, token=token, private=None, revision=revision)
            usual = FILE_NAME if any(name.startswith("<") for name in self.concepts) else PLAIN_NAME
            beside = choose_file(list_files(repo_id, token=token, revision=revision)) or usual
            written.rename(statistics_path(Path(folder, beside)))
            upload(Path(folder), repo_id, token=token, revision=revision, message="Fusion statistics")


class StoredStatistics(GramStatistics):
    """Statistics of one concept in a file: a matrix is read when it is used, and not kept.

    If the file is replaced by other statistics meanwhile, reading raises an error: otherwise some layers would be
    fused by the old statistics and some by the new. A file with the same header is accepted.
    """

    def __init__(
        self,
        path: Path,
        fingerprint: str,
        placeholder: str,
        numbers: Mapping[tuple[str, Part], Mapping[str, Any]],
        in_full: Collection[tuple[str, Part]],
    ) -> None:
        """Keep the path, the header's numbers of each matrix, and which matrices are stored in full."""
        self._path, self._fingerprint, self._placeholder = path, fingerprint, placeholder
        self._numbers, self._in_full = numbers, in_full

    @cached_property
    def counts(self) -> Mapping[tuple[str, Part], int]:
        """Number of tokens seen at each input in each part."""
        return {key: numbers["tokens"] for key, numbers in self._numbers.items()}

    def tensor_names(self) -> list[str]:
        """Names of all tensors of this concept in the file."""
        return [tensor for key in self._numbers for tensor in self._tensors_of(*key)]

    def _tensors_of(self, name: str, part: Part) -> list[str]:
        """Names of the tensors that store a matrix."""
        kinds = ("gram",) if (name, part) in self._in_full else ("rows", "scale")
        return [_tensor_name(self._placeholder, part, name, kind) for kind in kinds]

    def find_shape_defects(self, shapes: Shapes) -> list[str]:
        """Tensors that are neither square matrices nor rows with a scale each, and inputs of unequal widths."""
        wrong: list[str] = []
        widths: dict[str, set[tuple[int, ...]]] = {}
        for name, part in self._numbers:
            tensor, *scale = self._tensors_of(name, part)
            shape = shapes[tensor]
            rows = shapes[scale[0]] if scale else shape[1:]
            if len(shape) != 2 or rows != shape[:1] or shape[1] > WIDEST:
                wrong.append(tensor)
            widths.setdefault(name, set()).add(shape[-1:])
        return wrong + [name for name, found in widths.items() if len(found) > 1]

    def read(self, name: str, parts: Sequence[Part]) -> list[Gram]:
        """Gram matrices per token of the parts of an input; a low-rank factor where the file holds one.

        Raises:
            FusionError: If one holds NaN or Inf, or the file was replaced since its header was loaded.
        """

        def take(opened: Any) -> list[list[torch.Tensor]] | None:
            if _hash_of(opened.metadata()) != self._fingerprint:
                return None
            return [[opened.get_tensor(one).double() for one in self._tensors_of(name, part)] for part in parts]

        try:
            found = read_steadily(self._path, take)
        except (EDLoRAFormatError, EDLoRANotFoundError) as error:
            raise _unreadable_error(self._path, error) from error
        if found is None:
            raise _replaced_error(self._path)
        if not all(values.sum().isfinite() for stored in found for values in stored):
            raise FusionError(f"{self._path}: {name} of {self._placeholder} holds NaN or Inf. {_REMEDY}")
        return [self._gram(self._numbers[name, part], *stored) for part, stored in zip(parts, found, strict=True)]

    @staticmethod
    def _gram(numbers: Mapping[str, Any], values: torch.Tensor, scale: torch.Tensor | None = None) -> Gram:
        if scale is None:
            return DenseGram(values)
        return GramFactor(rows=values * scale[:, None], tail=numbers["tail"], energy=numbers["energy"])


def _hash_of(metadata: Mapping[str, str] | None) -> str:
    """Hash of a file's header: source, recording, and of every input its tokens, energy and tail."""
    return hashlib.sha256((metadata or {}).get(STATISTICS_KEY, "").encode()).hexdigest()


def _read_bytes(path: Path, fingerprint: str) -> bytes:
    """Bytes of a file whose header has this hash, checked in these bytes: a second read might find another file."""
    try:
        content = path.read_bytes()
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        found = _hash_of({STATISTICS_KEY: str(header["__metadata__"][STATISTICS_KEY])})
    except (OSError, ValueError, RecursionError, LookupError, TypeError) as error:
        raise _unreadable_error(path, error) from error
    if found != fingerprint:
        raise _replaced_error(path)
    return content


def _unreadable_error(path: Path, error: Exception) -> FusionError:
    return FusionError(f"{path} cannot be read any more: {sanitise(str(error))}. {_REMEDY}")


def _replaced_error(path: Path) -> FusionError:
    return FusionError(
        f"{path} was replaced by other statistics while it was in use. Fuse again with what is there now, and keep "
        "statistics apart that others write at the same time, with statistics='folder'."
    )


def _write_concept(
    placeholder: str, statistics: GramStatistics, max_bytes: MaxBytes, dtype: torch.dtype
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors and header entry of one concept."""
    keys = [(name, part) for name in statistics.inputs for part in PARTS if statistics.tokens(name, part)]
    widths, not_finite = _measure_grams(statistics, keys)
    if not_finite:
        raise FusionError(
            f"The statistics of {placeholder} hold NaN or Inf at {len(not_finite)} inputs, first at {not_finite[0]}. "
            "Sample the concept alone and look at the picture; in float16 a model may overflow, float32 does not."
        )
    factors = {} if max_bytes is None else _shrink(statistics, widths, max_bytes)
    tensors: dict[str, torch.Tensor] = {}
    entry: dict[str, Any] = {}
    for name, part in keys:
        gram = factors.get((name, part)) or statistics.gram(name, part)
        if isinstance(gram, GramFactor):
            scale = gram.rows.abs().amax(dim=1).clamp_min(torch.finfo(torch.float32).tiny).float()
            rows = (gram.rows / scale[:, None]).to(dtype if max_bytes is None else torch.half)
            tensors[_tensor_name(placeholder, part, name, "rows")] = rows
            tensors[_tensor_name(placeholder, part, name, "scale")] = scale
        else:
            tensors[_tensor_name(placeholder, part, name, "gram")] = gram.matrix().to(dtype).contiguous()
        numbers = {"tokens": statistics.counts[name, part], "tail": gram.tail, "energy": gram.energy}
        entry.setdefault(name, {})[part] = numbers
    return tensors, entry


def _measure_grams(
    statistics: GramStatistics, keys: Sequence[tuple[str, Part]]
) -> tuple[dict[tuple[str, Part], int], list[str]]:
    """Widths of all matrices, and the inputs whose matrix holds NaN or Inf; one matrix is in memory at a time."""
    widths, not_finite = {}, []
    for name, part in keys:
        gram = statistics.gram(name, part)
        widths[name, part] = gram.width
        if not gram.is_finite:
            not_finite.append(name)
    return widths, not_finite


def refuse_other_sizes(max_bytes: object) -> None:
    """Raise a `FusionError` for what is no size of saved statistics."""
    if max_bytes not in (None, "auto") and not (isinstance(max_bytes, Integral) and int(max_bytes) >= 1):
        raise FusionError(
            f"The size of saved statistics must be 'auto', None (in full) or a whole number of bytes of at least 1, "
            f"such as 10_000_000, got {max_bytes!r}."
        )


def _shrink(
    statistics: GramStatistics, widths: Mapping[tuple[str, Part], int], max_bytes: int | Literal["auto"]
) -> dict[tuple[str, Part], GramFactor]:
    """Low-rank factors of all matrices within a budget; each matrix is decomposed once."""
    of_inputs = {name: width for (name, _), width in widths.items()}
    usual = max(DEFAULT_BYTES, _BYTES_A_FEATURE * sum(of_inputs.values()))
    budget = usual if max_bytes == "auto" else int(max_bytes)
    known = most_rows(list(widths.values()), budget)
    spectra = {key: Spectrum.of(statistics.gram(*key), known) for key in widths}
    shares = {key: statistics.counts[key] / statistics.tokens(key[0]) for key in widths}
    kept = allocate_ranks({key: spectrum.values for key, spectrum in spectra.items()}, budget, shares)
    return {key: spectrum.leading(kept[key]) for key, spectrum in spectra.items()}


def _tensor_name(placeholder: str, part: Part, name: str, kind: str) -> str:
    return f"{placeholder}|{part}|{name}|{kind}"


def _open_file(path: Path) -> tuple[dict[str, Any], Shapes, str]:
    """Header of a file with its fields checked, the shapes of its tensors, and the header's hash."""

    def take(opened: Any) -> tuple[str, Shapes, str]:
        shapes = {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}
        return (opened.metadata() or {}).get(STATISTICS_KEY, ""), shapes, _hash_of(opened.metadata())

    try:
        text, shapes, fingerprint = read_steadily(path, take)
    except (EDLoRAFormatError, EDLoRANotFoundError) as error:
        defect = sanitise(str(error).partition(". Expected an ED-LoRA")[0].rstrip("."))
        raise DamagedStatisticsError(f"{path} cannot be read as fusion statistics: {defect}") from error
    header = decode(text)
    if not isinstance(header, dict):
        raise DamagedStatisticsError(f"{path} cannot be read as fusion statistics: its header is not a JSON object")
    version = header.get("format_version")
    if type(version) is not int or version != FORMAT_VERSION:
        told = f"{path}: format version {sanitise(repr(version))}, this release reads {FORMAT_VERSION}"
        newer = type(version) is int and version > FORMAT_VERSION
        raise FusionError(f"{told}. {_UPDATE}") if newer else DamagedStatisticsError(told)
    wanted = {"source": str, "base_model": str, "recording": dict, "form": str, "concepts": dict}
    wrong = [name for name, kind in wanted.items() if not isinstance(header.get(name), kind)]
    if wrong:
        raise DamagedStatisticsError(f"{path}: header fields missing or of another type: {', '.join(wrong)}")
    return header, shapes, fingerprint


def _check_entry(path: Path, entry: object) -> dict[tuple[str, Part], Mapping[str, Any]]:
    """Check a concept's entry of the header; returns the numbers of each input's parts."""
    inputs: dict[str, Any] = entry if isinstance(entry, dict) else {"": None}
    for parts in inputs.values():
        known = isinstance(parts, dict) and parts and set(parts) <= set(PARTS)
        if not known or not all(map(_is_numbers, parts.values())):
            raise DamagedStatisticsError(f"{path}: the inputs in its header do not follow this format version")
    return {(name, part): numbers for name, parts in inputs.items() for part, numbers in parts.items()}


def _is_numbers(numbers: object) -> bool:
    if not (isinstance(numbers, dict) and set(numbers) == {"tokens", "tail", "energy"}):
        return False
    finite = all(isinstance(value, int | float) and abs(value) < _LARGEST for value in numbers.values())
    return finite and type(numbers["tokens"]) is int and numbers["tokens"] > 0 and numbers["tail"] >= 0
