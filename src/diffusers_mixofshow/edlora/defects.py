"""Check an ED-LoRA by itself and against a model: every defect is reported, none is repaired."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping

import torch
from torch import nn

from diffusers_mixofshow.concepts import Concept, check_distinct
from diffusers_mixofshow.edlora.embeddings import join_name, split_name
from diffusers_mixofshow.edlora.low_rank import LowRank
from diffusers_mixofshow.errors import ConceptError, EDLoRAFormatError
from diffusers_mixofshow.families import FAMILIES, family_of
from diffusers_mixofshow.families.family import POOLED
from diffusers_mixofshow.families.layers import components_with_sites, embedding_layers, linear_layers
from diffusers_mixofshow.families.recognition import COMPONENTS, EMBEDDING_PARTS


DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

LONGEST_NAME = 100
"""Longest name or class word of a concept, in characters."""
WIDEST = 2**17
"""Most features of a layer that a file may claim; above any known model."""

_PART_NAMES = {"": "text_encoder", POOLED: "the pooled vector of the whole text"}
_CHECKED_AT_ONCE = 2**22
_NAMES_SHOWN = 6
_LONGEST_SHOWN = 160
_LONGEST_DEFECT = 1200
# Characters that control a terminal: control characters other than white space, and changes of text direction.
_CONTROLS = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def raise_if_any(defects: Collection[str], *, subject: str, remedy: str) -> None:
    """Raise one `EDLoRAFormatError` that lists all defects of the subject, or return if there are none."""
    if defects:
        said = "; ".join(sanitise(defect, _LONGEST_DEFECT) for defect in defects)
        raise EDLoRAFormatError(f"{subject}: {said}. {remedy}")


def sanitise(text: str, longest: int = _LONGEST_SHOWN) -> str:
    """Shorten a text from a file for a message, and escape its terminal control characters."""
    cut = text if len(text) <= longest else f"{text[: longest - 3]}..."
    return _CONTROLS.sub(lambda match: ascii(match.group())[1:-1], cut)


def is_showable(text: str) -> bool:
    """Whether a text has no terminal control characters."""
    return not _CONTROLS.search(text)


def list_names(names: Iterable[str]) -> str:
    """Number of names and the first few of them: ``3 (a, b, c)``."""
    names = list(names)
    first = ", ".join(sanitise(name) for name in names[:_NAMES_SHOWN])
    return f"{len(names)} ({first}{', ...' if len(names) > _NAMES_SHOWN else ''})"


def content_defects(
    concepts: Collection[Concept],
    embeddings: Mapping[str, torch.Tensor],
    lora: Mapping[str, LowRank],
    layers: Collection[str],
) -> list[str]:
    """Find inconsistencies within an ED-LoRA: names, shapes, dtypes, ranks, values that are not finite.

    Without concepts, embeddings and layers it is a plain LoRA, which must have at least one update.
    """
    if not (concepts or embeddings or layers):
        return _lora_defects(lora) if lora else ["it holds neither a concept nor an update"]
    return [*_embedding_defects(concepts, embeddings, len(layers)), *_lora_defects(lora), *_layer_defects(layers)]


def fit_defects(
    embeddings: Mapping[str, torch.Tensor],
    lora: Mapping[str, LowRank],
    layers: tuple[str, ...],
    components: Mapping[str, object],
) -> list[str]:
    """Find why an ED-LoRA cannot be used with a model; only the given components are checked."""
    models = components_with_sites(components)
    if not models:
        return [f"the model has none of {', '.join(COMPONENTS)}, got {list_names(map(str, components))}"]
    defects = _denoiser_defects(lora, components, models)
    theirs = embedding_layers(components)
    if theirs and layers and layers != theirs:
        defects.append(_layer_mismatch(layers, theirs))
    if embeddings:
        defects += _part_defects(embeddings, components, models)
    return defects + _site_defects(lora, linear_layers(components), models)


def _embedding_defects(
    concepts: Collection[Concept], embeddings: Mapping[str, torch.Tensor], layers: int
) -> list[str]:
    defects = [] if concepts else ["it holds no concept"]
    texts = [text for concept in concepts for text in (concept.placeholder, *concept.tokens, concept.class_word)]
    if odd := [text for text in texts if len(text) > LONGEST_NAME or not is_showable(text)]:
        defects.append(f"names longer than {LONGEST_NAME} characters, or with control characters: {list_names(odd)}")
    try:
        check_distinct(concepts)
    except ConceptError as error:
        defects.append(str(error).rstrip("."))
    tokens = [token for concept in concepts for token in concept.tokens]
    parts = dict.fromkeys(["", *(split_name(name)[0] for name in embeddings)])
    if missing := [name for token in tokens for part in parts if (name := join_name(token, part)) not in embeddings]:
        defects.append(f"missing embeddings: {list_names(missing)}")
    if surplus := [name for name in embeddings if split_name(name)[1] not in tokens]:
        defects.append(f"embeddings of tokens that no concept has: {list_names(surplus)}")
    if strange := [part for part in parts if part not in EMBEDDING_PARTS]:
        defects.append(f"embeddings for no known text encoder ({', '.join(EMBEDDING_PARTS)}): {list_names(strange)}")
    sound = {name: rows for name, rows in embeddings.items() if _is_stack(rows, 1 if _is_pooled(name) else layers)}
    if misshapen := [f"{name} {tuple(rows.shape)}" for name, rows in embeddings.items() if name not in sound]:
        one = f", or for {POOLED!r} (1, dim)" if POOLED in parts else ""
        defects.append(f"embeddings not of shape (layers = {layers}, dim){one}: {list_names(misshapen)}")
    else:
        defects += _unequal_widths(embeddings, parts)
    return defects + _number_defects("embeddings", sound)


def _is_pooled(name: str) -> bool:
    return split_name(name)[0] == POOLED


def _unequal_widths(embeddings: Mapping[str, torch.Tensor], parts: Iterable[str]) -> list[str]:
    """Find text encoders for which tokens' embeddings differ in width."""
    found = []
    for part in parts:
        widths = {name: rows.shape[1] for name, rows in embeddings.items() if split_name(name)[0] == part}
        if len(set(widths.values())) > 1:
            found.append(
                f"embeddings differ in width: {list_names(f'{name} {width}' for name, width in widths.items())}"
            )
    return found


def _is_stack(rows: torch.Tensor, layers: int) -> bool:
    return rows.dim() == 2 and len(rows) == layers and rows.shape[1] <= WIDEST


def _lora_defects(lora: Mapping[str, LowRank]) -> list[str]:
    defects = []
    if strange := [site for site in lora if site.partition(".")[0] not in COMPONENTS]:
        defects.append(f"layers of no known component ({', '.join(COMPONENTS)}): {list_names(strange)}")
    misshapen = [
        f"{site} down {tuple(update.down.shape)} up {tuple(update.up.shape)}"
        for site, update in lora.items()
        if not _is_pair(update)
    ]
    if misshapen:
        defects.append(f"not a pair of (rank, in) and (out, rank) with one rank >= 1: {list_names(misshapen)}")
    if endless := [f"{site} {update.alpha}" for site, update in lora.items() if not math.isfinite(update.alpha)]:
        defects.append(f"alpha is not finite: {list_names(endless)}")
    # Values are checked only if the shapes are right: a small file may claim huge tensors.
    sound = {site: update for site, update in lora.items() if _is_pair(update)}
    tensors = {f"{site}.down": update.down for site, update in sound.items()}
    tensors |= {f"{site}.up": update.up for site, update in sound.items()}
    return defects + _number_defects("LoRA matrices", tensors)


def _is_pair(update: LowRank) -> bool:
    both_matrices = update.down.dim() == 2 and update.up.dim() == 2
    return (
        both_matrices
        and update.down.shape[0] == update.up.shape[1] >= 1
        and max(*update.down.shape, *update.up.shape) <= WIDEST
    )


def _number_defects(what: str, tensors: Mapping[str, torch.Tensor]) -> list[str]:
    defects = []
    if odd := [f"{name} {tensor.dtype}" for name, tensor in tensors.items() if tensor.dtype not in DTYPES]:
        defects.append(f"{what} not in a floating dtype ({', '.join(map(str, DTYPES))}): {list_names(odd)}")
    elif endless := [name for name, tensor in tensors.items() if not _is_finite(tensor)]:
        defects.append(f"{what} with values that are not finite: {list_names(endless)}")
    return defects


def _is_finite(tensor: torch.Tensor) -> bool:
    """Whether all values are finite; checked in blocks of rows, because the check allocates memory."""
    rows = max(1, _CHECKED_AT_ONCE // max(1, tensor.shape[-1]))
    return all(bool(torch.isfinite(part).all()) for part in tensor.split(rows))


def _layer_defects(layers: Collection[str]) -> list[str]:
    defects = [] if layers else ["it names no cross-attention layers"]
    if len(set(layers)) != len(layers):
        defects.append("it names a cross-attention layer twice")
    return defects


def _layer_mismatch(ours: tuple[str, ...], theirs: tuple[str, ...]) -> str:
    if len(ours) != len(theirs):
        return f"it has embeddings for {len(ours)} cross-attention layers, the model has {len(theirs)}"
    differing = [f"{mine} is {other} in the model" for mine, other in zip(ours, theirs, strict=True) if mine != other]
    return f"cross-attention layers differ from the model's: {list_names(differing)}"


def _part_defects(
    embeddings: Mapping[str, torch.Tensor], components: Mapping[str, object], models: Mapping[str, nn.Module]
) -> list[str]:
    """Find missing, surplus and wrongly sized embeddings for a model's text encoders."""
    family = family_of(components)
    readers = family.embedding_parts
    widths: dict[str, dict[str, int]] = {}
    for name, rows in embeddings.items():
        widths.setdefault(split_name(name)[0], {})[name] = rows.shape[-1]
    absent = [part for part, encoder in readers.items() if encoder in models and part not in widths]
    surplus = [part for part in widths if family.denoiser in models and part not in readers]
    called = {part: _PART_NAMES.get(part, part) for part in (*readers, *widths)}
    defects = [f"it has no embeddings for {called[part]}, which the model reads" for part in absent]
    defects += [f"it has embeddings for {called[part]}, which the model does not read" for part in surplus]
    for part, found in widths.items():
        if readers.get(part) in models:
            width = models[readers[part]].get_input_embeddings().weight.shape[1]  # type: ignore[operator]
            wrong = [f"{name} {own}" for name, own in found.items() if own != width]
            defects += [f"embeddings must have the text encoder's width {width}: {list_names(wrong)}"] if wrong else []
    return defects


def _denoiser_defects(
    lora: Mapping[str, LowRank], components: Mapping[str, object], models: Mapping[str, nn.Module]
) -> list[str]:
    """Find updates of a denoiser that the model does not have, which would have no effect."""
    own = family_of(components).denoiser
    others = {family.denoiser for family in FAMILIES} - {own} if own in models else set()
    sites = {other: [site for site in lora if site.startswith(f"{other}.")] for other in sorted(others)}
    return [
        f"it has no {other}, whose layers it changes: {list_names(found)}" for other, found in sites.items() if found
    ]


def _site_defects(
    lora: Mapping[str, LowRank], sites: Mapping[str, nn.Module], models: Mapping[str, nn.Module]
) -> list[str]:
    of_given = {site: update for site, update in lora.items() if site.partition(".")[0] in models}
    defects = []
    if absent := [site for site in of_given if site not in sites]:
        defects.append(f"layers that the model does not have: {list_names(absent)}")
    misfits = []
    for site, update in of_given.items():
        if site in sites:
            ours = (update.up.shape[0], update.down.shape[1])
            theirs = _out_and_in(sites[site])
            if ours != theirs:
                misfits.append(f"{site} {ours}, in the model {theirs}")
    if misfits:
        defects.append(f"layers of another (out, in) size: {list_names(misfits)}")
    return defects


def _out_and_in(layer: nn.Module) -> tuple[object, object]:
    if isinstance(layer, nn.Conv2d):
        return layer.out_channels, layer.in_channels
    return layer.out_features, layer.in_features
