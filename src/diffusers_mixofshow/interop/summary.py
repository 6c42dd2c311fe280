"""Summarise an ED-LoRA or another program's file as JSON values."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from diffusers_mixofshow.edlora import EDLoRA
from diffusers_mixofshow.edlora.defects import list_names, sanitise
from diffusers_mixofshow.edlora.embeddings import split_name
from diffusers_mixofshow.edlora.low_rank import LowRank, input_widths
from diffusers_mixofshow.families import BaseModel
from diffusers_mixofshow.families.clip import CLIP_G, CLIP_L
from diffusers_mixofshow.families.recognition import foreign_layers, recognise, transformers_with
from diffusers_mixofshow.interop.concept_names import Naming, group_tokens
from diffusers_mixofshow.interop.foreign import Foreign, default_base, read_training
from diffusers_mixofshow.interop.textual_inversion import lost_in_mean
from diffusers_mixofshow.interop.trigger_words import find_origins, origins_of_sources, trigger_words_of_sources


_LARGEST = 5
_TOLD = ("ss_base_model_version", "ss_sd_model_name", "ss_output_name", "ss_network_dim", "ss_network_alpha")
"""Useful entries of kohya's metadata; the rest is training statistics."""


def origin_of_pack(pack: EDLoRA) -> dict[str, Any]:
    """Kind and base model of an ED-LoRA or fused pack; cheap, as no values are read."""
    widths = [{CLIP_G if split_name(name)[0] else CLIP_L: rows.shape[1]} for name, rows in pack.embeddings.items()]
    base = recognise(input_widths(pack.lora), widths)
    return {
        "kind": "fused pack" if "fusion" in pack.training else "ED-LoRA",
        "layout": "diffusers-mixofshow",
        "base_model": pack.base_model,
        "architecture": _architecture(base, pack.lora),
        "base_by_layers": base.id if base is not None else "",
    }


def summary_of_pack(pack: EDLoRA) -> dict[str, Any]:
    """Summarise an ED-LoRA or a fused pack."""
    return {
        **origin_of_pack(pack),
        "concepts": [
            {
                "placeholder": concept.placeholder,
                "class_word": concept.class_word,
                "kind": concept.kind,
                "tokens": {token: _mean_norm(pack.embeddings[token]) for token in concept.tokens},
                "lost_in_mean": {token: _round(lost_in_mean(pack.embeddings[token])) for token in concept.tokens},
            }
            for concept in pack.concepts
        ],
        "cross_attention_layers": len(pack.layers),
        **_of_lora(pack.lora),
        "alpha_from": "its header",
        **_of_tensors([*pack.embeddings.values(), *_halves(pack.lora)]),
        **_words_of_sources(pack.training),
        "training": dict(pack.training),
        "notes": [],
        "problems": [],
    }


def origin_of_foreign(foreign: Foreign) -> dict[str, Any]:
    """Kind and base model of another program's file; cheap, as no values are read."""
    return {
        "kind": foreign.kind.value,
        "layout": foreign.layout,
        "base_model": foreign.base_model or sanitise(foreign.metadata.get("ss_sd_model_name", "")),
        "architecture": _architecture(foreign.made_for, foreign.lora),
        "base_by_layers": default_base(foreign),
    }


def summary_of_foreign(foreign: Foreign) -> dict[str, Any]:
    """Summarise another program's file; its defects are under ``problems``."""
    base, origin, words = foreign.made_for, origin_of_foreign(foreign), find_origins(foreign.metadata)
    vectors = [rows for by_encoder in foreign.vectors.values() for rows in by_encoder.values()]
    problems = list(foreign.defects)
    if base is not None and (strange := foreign_layers(foreign.lora, base)):
        problems.append(f"layers that {base.name} does not have: {list_names(strange)}")
    if foreign.missing:
        problems.append(foreign.missing)
    if origin["architecture"] is None and (foreign.lora or vectors or foreign.tokens):
        problems.append("its layers and widths match no known base model")
    return {
        **origin,
        "concepts": [*_token_concepts(foreign), *_word_concepts(foreign)],
        "cross_attention_layers": max((len(rows) for rows in foreign.tokens.values()), default=0),
        **_of_lora(foreign.lora),
        "alpha_from": foreign.alpha_from,
        **_of_tensors([*foreign.tokens.values(), *vectors, *_halves(foreign.lora)]),
        "trigger_words": list(words),
        "trigger_words_from": words,
        **_words_of_sources(read_training(foreign.metadata)),
        "training": {key: sanitise(foreign.metadata[key]) for key in _TOLD if key in foreign.metadata},
        "notes": list(foreign.remarks),
        "problems": problems,
    }


def _token_concepts(foreign: Foreign) -> list[dict[str, Any]]:
    members: dict[str, list[str]] = {}
    for token, (concept, _) in group_tokens(foreign.tokens, Naming()).items():
        members.setdefault(concept.placeholder, []).append(str(token))
    return [
        {
            "placeholder": placeholder,
            "class_word": None,
            "kind": None,
            "tokens": {token: _mean_norm(foreign.tokens[token]) for token in tokens},
            "lost_in_mean": {token: _round(lost_in_mean(foreign.tokens[token])) for token in tokens},
        }
        for placeholder, tokens in members.items()
    ]


def _word_concepts(foreign: Foreign) -> list[dict[str, Any]]:
    return [
        {
            "placeholder": word,
            "class_word": foreign.meanings[word].class_word if word in foreign.meanings else None,
            "kind": foreign.meanings[word].kind if word in foreign.meanings else None,
            "tokens": {
                f"{encoder}, {len(rows)} x {rows.shape[1]}": _mean_norm(rows) for encoder, rows in them.items()
            },
        }
        for word, them in foreign.vectors.items()
    ]


def format_norm(norm: float | None) -> str:
    """Format a norm for display."""
    return "not finite" if norm is None else f"{norm:.3f}"


def facts_of(summary: Mapping[str, Any]) -> dict[str, object]:
    """Facts of a summary, one short line each, without empty ones.

    Args:
        summary: Summary of a pack or file, with its size under ``bytes``, None if it is on the Hub.
    """
    layers = ", ".join(f"{component} {count}" for component, count in summary["layers"].items())
    base = summary["base_model"] or summary["architecture"] or "unknown"
    if summary["base_model"] and summary["architecture"]:
        base += f" ({summary['architecture']})"
    elif not summary["base_model"] and summary["base_by_layers"]:
        base += f" (--base {summary['base_by_layers']})"
    facts = {
        "kind": summary["kind"],
        "layout": summary["layout"],
        "base model": base,
        "trigger words": _describe_trigger_words(summary),
        "trigger words from": _describe_origins(summary),
        "rank": ", ".join(map(str, summary["ranks"])),
        "alpha": ", ".join(f"{alpha:g}" for alpha in summary["alphas"]),
        "alpha from": summary["alpha_from"] if layers else "",
        "adapted layers": f"{summary['adapted_layers']} ({layers})" if layers else "",
        "cross-attention layers": summary["cross_attention_layers"] or "",
        "parameters": f"{summary['parameters']:,} ({', '.join(summary['dtypes'])})" if summary["dtypes"] else "",
        "size": "on the Hub" if summary["bytes"] is None else f"{summary['bytes'] / 1e6:.2f} MB",
    }
    return {name: value for name, value in facts.items() if value != ""}


def _words_of_sources(training: Mapping[str, object]) -> dict[str, dict[str, Any]]:
    """Trigger words of each plain LoRA that a pack was fused from, and their origin; empty if there is none."""
    found = {name: list(words) for name, words in trigger_words_of_sources(training).items()}
    return {"trigger_words_of_sources": found, "trigger_words_from": origins_of_sources(training)} if found else {}


def _describe_trigger_words(summary: Mapping[str, Any]) -> str:
    """Trigger words of a plain LoRA, or by source those of a pack; empty where concepts are all that there is."""
    if of_sources := summary.get("trigger_words_of_sources"):
        return "; ".join(f"{name}: {', '.join(words) or 'not known'}" for name, words in of_sources.items())
    return "" if summary["concepts"] else ", ".join(summary.get("trigger_words", ())) or "none"


def _describe_origins(summary: Mapping[str, Any]) -> str:
    """Whether trigger words are stated or guessed: once, if that is the same for all of them."""
    notes = summary.get("trigger_words_from", {})
    if len(set(notes.values())) == 1:
        return str(next(iter(notes.values())))
    return "; ".join(f"{name}: {note}" for name, note in notes.items())


def _architecture(base: BaseModel | None, lora: Mapping[str, LowRank]) -> str | None:
    """Name of the base model, or of every transformer family that has these layers; None if unknown."""
    if base is not None:
        return base.name
    return " or ".join(family.name for family in transformers_with(input_widths(lora))) or None


def _of_lora(lora: Mapping[str, LowRank]) -> dict[str, Any]:
    norms = {site: _norm(update) for site, update in lora.items()}
    largest = sorted(norms.items(), key=lambda item: -item[1])[:_LARGEST]
    return {
        "ranks": sorted({update.rank for update in lora.values()}),
        "alphas": _distinct(update.alpha for update in lora.values()),
        "scalings": _distinct(update.scaling for update in lora.values()),
        "adapted_layers": len(lora),
        "layers": dict(Counter(site.partition(".")[0] for site in lora)),
        "largest_updates": {site: _round(norm) for site, norm in largest},
    }


def _distinct(numbers: Iterable[float]) -> list[float]:
    return sorted({float(f"{number:.6g}") for number in numbers if math.isfinite(number)})


def _of_tensors(tensors: Iterable[torch.Tensor]) -> dict[str, Any]:
    tensors = list(tensors)
    return {
        "parameters": sum(tensor.numel() for tensor in tensors),
        "dtypes": sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors}),
    }


def _halves(lora: Mapping[str, LowRank]) -> list[torch.Tensor]:
    return [half for update in lora.values() for half in (update.down, update.up)]


def _mean_norm(embedding: torch.Tensor) -> float | None:
    """Mean norm of vectors, shape (vectors, dim)."""
    return _round(float(embedding.float().norm(dim=1).mean()))


def _round(value: float) -> float | None:
    """Round for JSON; None if not finite, which JSON does not have."""
    return round(value, 4) if math.isfinite(value) else None


def _norm(update: LowRank) -> float:
    """Frobenius norm of ``alpha / rank * up @ down``, from products of shape (rank, rank)."""
    down, up = update.down.double(), update.up.double()
    square = float(((up.T @ up) * (down @ down.T)).sum())
    return abs(update.scaling) * max(square, 0.0) ** 0.5
