"""Read files of other programs that hold a concept or a LoRA, recognise their kind, and convert them to `EDLoRA`."""

from __future__ import annotations

import os
import re
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

import torch

from diffusers_mixofshow.edlora import EDLoRA
from diffusers_mixofshow.edlora.defects import list_names, raise_if_any, sanitise
from diffusers_mixofshow.edlora.embeddings import join_name
from diffusers_mixofshow.edlora.file import FILE_NAME, STATISTICS_KEY
from diffusers_mixofshow.edlora.fusion_record import CARRIED, as_mapping, read_plain_record, record_of
from diffusers_mixofshow.edlora.low_rank import LowRank, input_widths
from diffusers_mixofshow.edlora.reading import open_tensors, read_metadata, within
from diffusers_mixofshow.errors import EDLoRAFormatError, EDLoRANotFoundError, warn
from diffusers_mixofshow.families import BaseModel
from diffusers_mixofshow.families.clip import CLIP_G, CLIP_L
from diffusers_mixofshow.families.family import POOLED
from diffusers_mixofshow.families.recognition import COMPONENTS, layers_of, recognise
from diffusers_mixofshow.families.sdxl import SDXL, STABLE_DIFFUSION_XL
from diffusers_mixofshow.interop.concept_names import Meaning, Naming, distinct_names, group_tokens, name_words
from diffusers_mixofshow.interop.lora_files import EMBEDDINGS, list_companions
from diffusers_mixofshow.interop.lora_tensors import LoRAContent, content_of
from diffusers_mixofshow.interop.lycoris import is_part
from diffusers_mixofshow.interop.names import half_of
from diffusers_mixofshow.interop.original import ORIGINAL_NAME, is_original, original_content
from diffusers_mixofshow.interop.tensors import PICKLES, load_pickle, load_safetensors
from diffusers_mixofshow.interop.textual_inversion import Vectors, inversion_content, read_meaning
from diffusers_mixofshow.interop.trigger_words import TOLD, find_trigger_words


_STEP = re.compile(r"-steps-\d+(?=\.)")
"""What diffusers' example puts after the name of a textual inversion that is not trained to its end."""
_MOST_WORDS = 64
"""A textual-inversion file has at most this many tensors."""
_ADAPTERS = tuple(
    f"{stem}{end}" for stem in ("pytorch_lora_weights", "adapter_model") for end in (".safetensors", ".bin")
)
"""File names of an adapter's weights in diffusers and PEFT."""
FOREIGN_NAMES = (*_ADAPTERS, ORIGINAL_NAME, "learned_embeds.safetensors", "learned_embeds.bin")
"""File names of other programs by which a folder or repository is known to hold a concept or a LoRA."""


class Kind(StrEnum):
    """Kind of a file."""

    MIX_OF_SHOW = "ED-LoRA of the authors' code"
    LORA = "LoRA"
    TEXTUAL_INVERSION = "textual inversion"
    LORA_AND_EMBEDDINGS = "LoRA with embeddings"
    OTHER = "neither LoRA nor embeddings"


@dataclass(frozen=True, kw_only=True)
class Foreign:
    """Content of another program's files, including its defects.

    Args:
        kind: Kind of the file.
        layout: The program whose names and tensors the file follows.
        files: The files that were read.
        lora: Site name to update.
        tokens: Token to its layer-wise embedding, shape (layers, dim), or (1, dim) if all layers share it.
        vectors: Word to the vectors of a textual inversion, by text encoder.
        meanings: Word of a textual inversion to what its file tells of the concept.
        metadata: Metadata of the LoRA file.
        alpha_from: Where the alphas of the updates come from, in words.
        remarks: Assumptions that no program's convention decides, each as a sentence.
        missing: Files that belong to it and are missing, as a sentence; empty if none.
        defects: Why parts of it cannot be used.
    """

    kind: Kind
    layout: str
    files: tuple[Path, ...]
    lora: Mapping[str, LowRank] = field(default_factory=dict)
    tokens: Mapping[str, torch.Tensor] = field(default_factory=dict)
    vectors: Mapping[str, Vectors] = field(default_factory=dict)
    meanings: Mapping[str, Meaning] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    alpha_from: str = ""
    remarks: tuple[str, ...] = ()
    missing: str = ""
    defects: tuple[str, ...] = ()

    @property
    def base_model(self) -> str:
        """The base model that a LoRA which this package fused was fused for; empty for other files."""
        return read_plain_record(self.metadata)[1]

    @property
    def made_for(self) -> BaseModel | None:
        """The base model it was made for, recognised by its layers and widths; None if unknown."""
        widths = [{encoder: rows.shape[1] for encoder, rows in one.items()} for one in self.vectors.values()]
        widths += [{CLIP_L: rows.shape[1]} for rows in self.tokens.values()]
        return recognise(input_widths(self.lora), widths)

    def raise_if_defective(self) -> None:
        """Raise one `EDLoRAFormatError` that lists all defects, if there are any."""
        subject = ", ".join(map(str, self.files))
        raise_if_any(self.defects, subject=subject, remedy="Expected a LoRA or embeddings of a supported base.")


def read_foreign(source: str | os.PathLike[str], beside: Sequence[Path] = ()) -> Foreign:
    """Read a file of another program, or a folder with a LoRA and the embeddings that belong to it.

    For a plain LoRA written by this package, its embeddings in ``embeddings/`` beside it are read as well.

    Args:
        source: Safetensors, or ``.pth``, ``.pt``, ``.bin``, ``.ckpt``: pickles are read with ``weights_only=True``.
        beside: Files of embeddings that belong to a file, in its folder.

    Raises:
        EDLoRANotFoundError: If there is no such file.
        EDLoRAFormatError: If it cannot be read at all, or is an ED-LoRA of this package. Other defects are in
            `Foreign.defects`.

    Warns:
        MixOfShowWarning: Of assumptions and missing files, see `Foreign.remarks` and `Foreign.missing`.
    """
    path = Path(source)
    if "edlora" in read_metadata(path / FILE_NAME if path.is_dir() else path):
        raise EDLoRAFormatError(
            f"{path} is an ED-LoRA of this package. Read it: EDLoRA.from_pretrained({str(path)!r})."
        )
    found = _read_folder(path) if path.is_dir() else _read_with_companions(path, beside)
    names = distinct_names(list_companions(found.metadata))
    if lacking := [word for word, name in names.items() if not {word, name} & found.vectors.keys()]:
        told = (
            f"it was trained with embeddings that are missing in {EMBEDDINGS}/ beside it: {list_names(lacking)}; "
            "without them no prompt draws what it learnt"
        )
        found = replace(found, missing=told)
    for remark in filter(None, (*found.remarks, found.missing)):
        warn(f"{path}: {remark}.")
    return found


def _read_with_companions(path: Path, beside: Sequence[Path]) -> Foreign:
    found = _read_file(path)
    names = distinct_names(list_companions(found.metadata)).values()
    beside = [*beside, *(path.with_name(EMBEDDINGS) / f"{name}.safetensors" for name in names)]
    there = [within(path.parent, *file.relative_to(path.parent).parts) for file in beside if file.is_file()]
    words = [_read_file(file) for file in there]
    _refuse_words_told_twice(path.parent, words)
    return _join([found, *words])


def _read_file(path: Path, component: str = "") -> Foreign:
    """Read one file; `component`, from the folder's name, is put before names that have none."""
    return (_read_pickle if path.suffix in PICKLES else _read_safetensors)(path, component)


def read_as_edlora(
    source: str | os.PathLike[str],
    *,
    name: str = "",
    class_word: str = "",
    kind: str = "",
    base_model: str = "",
    layers: tuple[str, ...] = (),
) -> EDLoRA:
    """Read any file of another program as an `EDLoRA`: without concepts if it is a plain LoRA, without updates if it
    is a textual inversion.

    Supported are the authors' ``.pth``, LoRA files in the names of kohya, A1111, ComfyUI, diffusers and PEFT,
    textual-inversion files, and folders with a LoRA and its embeddings, as diffusers' advanced training scripts write.

    Args:
        source: The file or folder.
        name: Name of the concept in prompts; by default the file's own word for it.
        class_word: The plain word for what it is; only files that this package wrote contain it.
        kind: One of ``character``, ``pet``, ``object``, ``scene``; by default the file's own, else ``object``.
        base_model: Base model it was tuned on; files do not name it reliably.
        layers: The base's cross-attention layers (`families.layers.cross_attention_layers`), if it is not Stable
            Diffusion 1.x or 2.x and the LoRA does not contain them all.

    Raises:
        EDLoRANotFoundError: If there is no such file.
        EDLoRAFormatError: If anything in it is defective or cannot be converted, or it is an ED-LoRA of this package;
            lists every defect.
        ConceptError: If the name or kind is malformed.
    """
    naming = Naming(name=name, class_word=class_word, kind=kind, base_model=base_model)
    return to_edlora(read_foreign(source), naming, layers)


def to_edlora(foreign: Foreign, naming: Naming, layers: tuple[str, ...]) -> EDLoRA:
    """Convert the content of a file to an `EDLoRA`, see `read_as_edlora`."""
    foreign.raise_if_defective()
    subject = ", ".join(map(str, foreign.files))
    of_xl = any(CLIP_G in vectors for vectors in foreign.vectors.values())
    if of_xl:
        _refuse_half_of_xl(foreign, subject)
        model = foreign.made_for or SDXL
        layers = layers or tuple(dict.fromkeys(map(STABLE_DIFFUSION_XL.embedding_layer_of, model.layers)))
    words = {word: by_encoder[CLIP_L] for word, by_encoder in foreign.vectors.items()}
    found = group_tokens(foreign.tokens, naming) | name_words(
        {word: len(rows) for word, rows in words.items()}, naming, foreign.meanings
    )
    rows: dict[Hashable, torch.Tensor] = dict(foreign.tokens.items())
    rows |= {(word, number): row for word, them in words.items() for number, row in _number_vectors(them)}
    widths = {embedding.shape[1] for embedding in rows.values()}
    counts = {len(embedding) for embedding in rows.values()} - {1}
    if len(counts) > 1 or len(widths) > 1:
        shapes = list_names(f"{found[key][1]} {tuple(embedding.shape)}" for key, embedding in rows.items())
        raise EDLoRAFormatError(f"{subject}: embeddings of different shapes: {shapes}. They belong to one base model.")
    if rows and not layers:
        layers = layers_of(input_widths(foreign.lora), max(widths), max(counts, default=None))
        if not layers:
            raise EDLoRAFormatError(
                f"{subject}: embeddings of shape {tuple(next(iter(rows.values())).shape)}, which no known base "
                "has. Give the base's cross-attention layers, layers=cross_attention_layers(pipe.unet)."
            )
    embeddings = {found[key][1]: _expand(embedding, len(layers)) for key, embedding in rows.items()}
    tokens = {key: token for key, (_, token) in found.items()}
    return EDLoRA(
        concepts=tuple(dict.fromkeys(concept for concept, _ in found.values())),
        embeddings=embeddings | (_for_second_encoder(foreign, tokens, len(layers)) if of_xl else {}),
        lora=foreign.lora,
        base_model=naming.base_model or foreign.base_model,
        layers=layers if rows else (),
        training={"converted_from": f"{foreign.kind} ({foreign.layout})", **read_training(foreign.metadata)},
    )


def read_training(metadata: Mapping[str, str]) -> dict[str, object]:
    """What a plain LoRA's metadata tell: the record of its fusion, prompts if a pack carries it, and trigger words."""
    training = read_plain_record(metadata)[0]
    told = {"fusion": record_of(training), CARRIED: as_mapping(training.get(CARRIED))}
    words = find_trigger_words(metadata)
    return {key: value for key, value in told.items() if value} | ({TOLD: list(words)} if words else {})


def _refuse_half_of_xl(foreign: Foreign, subject: str) -> None:
    """Refuse words without the same number of vectors for both text encoders of SDXL."""
    halves = []
    for word, vectors in foreign.vectors.items():
        counts = {encoder: len(vectors.get(encoder, ())) for encoder in (CLIP_L, CLIP_G)}
        if len(set(counts.values())) > 1:
            halves.append(f"{word} ({', '.join(f'{count} {encoder}' for encoder, count in counts.items())})")
    halves += [str(token) for token in foreign.tokens]
    if halves:
        raise EDLoRAFormatError(
            f"{subject}: not as many vectors for each of SDXL's two text encoders: {list_names(halves)}. Expected "
            f"{CLIP_L!r} and {CLIP_G!r} of the same length for every word."
        )


def _for_second_encoder(foreign: Foreign, tokens: Mapping[Hashable, str], layers: int) -> dict[str, torch.Tensor]:
    """Embeddings of every word for SDXL's second text encoder: for all layers, and for the pooled vector."""
    rows = {
        tokens[word, number]: row
        for word, vectors in foreign.vectors.items()
        for number, row in _number_vectors(vectors[CLIP_G])
    }
    of_layers = {join_name(token, "text_encoder_2"): _expand(row, layers) for token, row in rows.items()}
    return of_layers | {join_name(token, POOLED): row for token, row in rows.items()}


def default_base(foreign: Foreign) -> str:
    """Id of the default base model of the recognised family; empty if there is none."""
    return foreign.made_for.id if foreign.made_for else ""


def _expand(embedding: torch.Tensor, layers: int) -> torch.Tensor:
    """Expand an embedding of shape (1, dim) to (layers, dim); return any other unchanged."""
    return embedding.expand(layers, -1).contiguous() if len(embedding) == 1 else embedding


def _number_vectors(vectors: torch.Tensor) -> Iterable[tuple[int, torch.Tensor]]:
    """Pairs of (number from 1, vector of shape (1, dim))."""
    return enumerate(vectors.split(1), start=1)


def _read_pickle(path: Path, component: str) -> Foreign:
    content = load_pickle(path)
    if is_original(content):
        found = original_content(content)
        return Foreign(
            kind=Kind.MIX_OF_SHOW,
            layout="Mix-of-Show, the authors' code",
            files=(path,),
            lora=found.lora,
            tokens=found.tokens,
            alpha_from="the authors' code, which scales by 1" if found.lora else "",
            defects=(*found.defects, *_list_not_finite(found.tokens)),
        )
    return _sort(path, content, {}, component)


def _read_safetensors(path: Path, component: str) -> Foreign:
    if STATISTICS_KEY in read_metadata(path):
        raise EDLoRAFormatError(
            f"{path} holds fusion statistics of an ED-LoRA, not the ED-LoRA itself. Give the "
            "edlora.safetensors beside it."
        )
    names = _read_names(path)
    if len(names) > _MOST_WORDS and not any(half_of(name) or is_part(name) for name in names):
        # A checkpoint or other layers: the names are enough, so gigabytes of tensors are not read.
        return _of_lora(path, content_of(dict.fromkeys(names, torch.empty(0)), {}))
    metadata, tensors = load_safetensors(path)
    return _sort(path, tensors, metadata, component)


def _sort(path: Path, content: Any, metadata: Mapping[str, str], component: str) -> Foreign:
    tensors = {str(name): tensor for name, tensor in _items(content) if isinstance(tensor, torch.Tensor)}
    found = inversion_content(content, path.stem.removesuffix("_emb"))
    if found is not None:
        meaning = read_meaning(metadata)
        return Foreign(
            kind=Kind.TEXTUAL_INVERSION,
            layout=found.layout,
            files=(path,),
            vectors=found.vectors,
            meanings=dict.fromkeys(found.vectors, meaning) if meaning else {},
            metadata=metadata,
            defects=_list_not_finite_vectors(found.vectors),
        )
    if component:
        tensors = {f"{component}.{name.removeprefix(f'{component}.')}": tensor for name, tensor in tensors.items()}
    return _of_lora(path, content_of(tensors, metadata, path))


def _of_lora(path: Path, found: LoRAContent) -> Foreign:
    kind = Kind.LORA_AND_EMBEDDINGS if found.bundled else Kind.LORA if found.spelling else Kind.OTHER
    return Foreign(
        kind=kind,
        layout=found.spelling.value if found.spelling else "",
        files=(path,),
        lora=found.lora,
        vectors={word: dict(vectors) for word, vectors in found.bundled.items()},
        metadata=found.metadata,
        alpha_from=found.alpha_from,
        remarks=found.remarks,
        defects=(*found.defects, *_list_not_finite_vectors(found.bundled)),
    )


def _list_not_finite_vectors(vectors: Mapping[str, Mapping[str, torch.Tensor]]) -> tuple[str, ...]:
    return _list_not_finite(
        {f"{word} {encoder}": rows for word, them in vectors.items() for encoder, rows in them.items()}
    )


def _list_not_finite(embeddings: Mapping[str, torch.Tensor]) -> tuple[str, ...]:
    """One defect that lists embeddings with NaN or Inf; empty if none."""
    found = [name for name, rows in embeddings.items() if not bool(torch.isfinite(rows).all())]
    return (f"embeddings with values that are not finite: {list_names(found)}",) if found else ()


def _read_folder(folder: Path) -> Foreign:
    """Read a LoRA and its embeddings from a folder.

    The LoRA is one file or, as PEFT's DreamBooth example writes it, one folder for each model.
    """
    patterns = ("*.safetensors", "*.pth", "learned_embeds*.bin", *_ADAPTERS, f"{EMBEDDINGS}/*.safetensors")
    paths = _files_in(folder, patterns)
    models = {model: _files_in(folder, [f"{model}/{name}" for name in _ADAPTERS]) for model in COMPONENTS}
    if not paths and not any(models.values()):
        below = sorted({path.parent.name for name in (FILE_NAME, *FOREIGN_NAMES) for path in folder.glob(f"*/{name}")})
        hint = f"Its subfolders do, give one of them: {list_names(below)}." if below else "Give the file itself."
        raise EDLoRANotFoundError(f"{folder} holds no LoRA, ED-LoRA or textual inversion. {hint}")
    parts = [_read_file(path) for path in paths]
    bodies = [part for part in parts if part.kind is not Kind.TEXTUAL_INVERSION]
    of_models = [_read_file(path, model) for model, found in models.items() for path in found]
    if len(bodies) + bool(of_models) > 1 or any(len(found) > 1 for found in models.values()):
        names = (path.relative_to(folder).as_posix() for part in (*bodies, *of_models) for path in part.files)
        raise EDLoRAFormatError(f"{folder} holds several LoRAs: {list_names(names)}. Give one of them.")
    words = [part for part in parts if part.kind is Kind.TEXTUAL_INVERSION]
    _refuse_words_told_twice(folder, words)
    return _join([*bodies, *of_models, *words])


def _refuse_words_told_twice(folder: Path, parts: Sequence[Foreign]) -> None:
    """Refuse a word that several files have, such as those of several steps of a training."""
    files: dict[str, list[str]] = {}
    for part in parts:
        for word in part.vectors:
            files.setdefault(word, []).extend(path.relative_to(folder).as_posix() for path in part.files)
    if twice := {word: names for word, names in files.items() if len(names) > 1}:
        told = "; ".join(f"{sanitise(word)} in {list_names(names)}" for word, names in twice.items())
        raise EDLoRAFormatError(f"{folder} holds several files of the same word: {told}. Give one of them alone.")


def _files_in(folder: Path, patterns: Sequence[str]) -> list[Path]:
    """Files that match; a ``.bin`` is skipped if a safetensors file of the same name exists, as PEFT does."""
    found = {path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    kept = [path for path in found if path.suffix != ".bin" or path.with_suffix(".safetensors") not in found]
    paths = sorted(within(folder, *path.relative_to(folder).parts) for path in kept)
    final = {path.name for path in paths}
    return [  # statistics may lie beside any LoRA, and files of earlier steps beside the final one
        path
        for path in paths
        if STATISTICS_KEY not in read_metadata(path)
        and not (_STEP.search(path.name) and _STEP.sub("", path.name) in final)
    ]


def _join(parts: Sequence[Foreign]) -> Foreign:
    """Join files that belong together: the LoRA first, if there is one, then embeddings."""
    if len(parts) == 1:
        return parts[0]
    body = parts[0]
    words = {word: rows for part in parts for word, rows in part.vectors.items()}
    alone = not words or body.kind is Kind.TEXTUAL_INVERSION
    return Foreign(
        kind=body.kind if alone else Kind.LORA_AND_EMBEDDINGS,
        layout=body.layout,
        files=tuple(path for part in parts for path in part.files),
        lora={site: update for part in parts for site, update in part.lora.items()},
        tokens=body.tokens,
        vectors=words,
        meanings={word: told for part in parts for word, told in part.meanings.items()},
        metadata=body.metadata,
        alpha_from=", ".join(dict.fromkeys(part.alpha_from for part in parts if part.alpha_from)),
        remarks=tuple(dict.fromkeys(remark for part in parts for remark in part.remarks)),
        defects=tuple(defect for part in parts for defect in part.defects),
    )


def _read_names(path: Path) -> list[str]:
    """Names of a safetensors file's tensors, from its header alone; empty if that cannot be read."""
    try:
        with open_tensors(path) as opened:
            return list(opened.keys())
    except (EDLoRAFormatError, EDLoRANotFoundError):  # reported when the tensors are read
        return []


def _items(content: Any) -> Iterable[tuple[Any, Any]]:
    return content.items() if isinstance(content, Mapping) else ()
