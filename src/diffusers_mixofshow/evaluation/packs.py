"""Measure every concept of every pack with the same prompts and seeds, and its class word on the base model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from PIL import Image

from diffusers_mixofshow.edlora import EDLoRA
from diffusers_mixofshow.evaluation import metrics
from diffusers_mixofshow.evaluation.agreement import Packs, find_own_packs, unify_concepts
from diffusers_mixofshow.evaluation.identity import (
    Identity,
    Judge,
    Subject,
    mean_identity,
    measure_identity,
    measure_photos,
    retention,
)
from diffusers_mixofshow.evaluation.plain import Measurable, MeasuredPack, has_class_word, mention_of, settle_words
from diffusers_mixofshow.evaluation.sampling import ON_PICTURES, Sampling, fill_templates, sample_pictures
from diffusers_mixofshow.lora import loaded


CLASS_WORD = "class word"
"""In place of a pack's name in rows of the base model, which is prompted with the concept's class word."""

MEAN = "mean"
"""In place of a concept's name in rows of means over a pack's concepts."""

TEMPLATES = Callable[[Measurable], Sequence[str]]
"""Concept, or plain LoRA, to its prompt templates with ``<TOK>``."""


@dataclass(frozen=True, kw_only=True)
class Reference:
    """Photos and attributes that a concept's pictures are compared with.

    Args:
        photos: Photos of the concept, at least one.
        attributes: Values that the judge should read in its pictures; empty if they are not known.
    """

    photos: Sequence[Image.Image]
    attributes: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Row:
    """Measures of one concept in one pack.

    Args:
        concept: The concept's placeholder, the plain LoRA's name, or `MEAN`.
        pack: The pack's name, or `CLASS_WORD`.
        text_alignment: CLIPScore of the pictures and their prompts, which name the class word in the concept's place;
            those of a plain LoRA whose class word is not known name its trigger words.
        identity: How well the pictures show the concept; None without photos.
        retention: Share of the gain of the concept's own ED-LoRA over the class word that this pack keeps, for every
            measure; None if its own ED-LoRA is not among the packs, or is this pack.
        drift: 1 - cosine of pictures of the class word with the pack loaded and without, of equal seeds; None if the
            class word is not known.
    """

    concept: str
    pack: str
    text_alignment: float
    identity: Identity | None = None
    retention: Mapping[str, float | None] | None = None
    drift: float | None = None

    def as_record(self) -> dict[str, Any]:
        """Rounded JSON values."""
        return {
            "concept": self.concept,
            "pack": self.pack,
            "text_alignment": round(self.text_alignment, 4),
            "identity": None if self.identity is None else self.identity.as_record(),
            "retention": None if self.retention is None else dict(self.retention),
            "drift": None if self.drift is None else round(self.drift, 4),
        }


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Measures of all concepts in all packs, with the pictures that were measured.

    Args:
        rows: The measures, concept by concept, with the means of packs last.
        pictures: (concept, pack) to pictures.
        photos: Placeholder to what the concept's photos score themselves, see `measure_photos`.
    """

    rows: tuple[Row, ...]
    pictures: Mapping[tuple[str, str], Sequence[Image.Image]]
    photos: Mapping[str, Mapping[str, float | None]] = field(default_factory=dict)


def evaluate_packs(
    pipe: Any,
    packs: Mapping[str, EDLoRA | MeasuredPack],
    judge: Judge,
    references: Mapping[str, Reference],
    *,
    templates: TEMPLATES,
    sampling: Sampling,
    count: int,
    advance: ON_PICTURES = lambda pictures: None,
) -> Evaluation:
    """Measure every concept of every pack.

    The first pack that holds a concept alone is the concept's own ED-LoRA. Retention in other packs refers to it, and
    its class word and kind are used if packs differ, see `unify_concepts`. Plain LoRAs, alone or fused, are measured
    by their trigger words; those whose class word is not known without its row, retention and drift.

    Args:
        pipe: The base as a Mix-of-Show pipeline without a loaded concept; afterwards none is loaded either. For plain
            LoRAs, a pipeline of diffusers will do.
        packs: Name to pack; a `MeasuredPack` tells what a file of a plain LoRA does not.
        judge: Computes features and reads attributes.
        references: Placeholder to photos; without, only the text-alignment of a concept is measured.
        templates: Prompts of a concept.
        sampling: How pictures are sampled.
        count: Pictures of each concept in each pack.
        advance: Called with the number of newly finished pictures, of `picture_count`.
    """
    samples, packs = _Samples(judge), unify_concepts(settle_words(_as_measured(packs)))

    def sample(concept: Measurable, subject: str) -> list[Image.Image]:
        return sample_pictures(pipe, fill_templates(templates(concept), subject, count), sampling, advance=advance)

    for concept in _by_class_word(packs.values()).values():
        samples.floors[_class_key(concept)] = sample(concept, concept.class_word)
    for name, pack in packs.items():
        with loaded(pipe, pack.pack):
            for concept in pack.concepts:
                samples.alone[concept.placeholder, name] = sample(concept, mention_of(concept))
            for concept in _by_class_word([pack]).values():
                samples.note_drift(name, concept, sample(concept, concept.class_word))
    subjects = {
        placeholder: Subject(name=placeholder, photos=judge.features(one.photos), attributes=one.attributes)
        for placeholder, one in references.items()
    }

    def row(concept: Measurable, name: str) -> Row:
        subject = concept.class_word if has_class_word(concept) else mention_of(concept)
        texts = fill_templates(templates(concept), subject, count)
        return samples.measure(concept, name, texts, subjects)

    rows = [row(concept, name) for name, pack in packs.items() for concept in pack.concepts]
    concepts = {concept.placeholder: concept for pack in packs.values() for concept in pack.concepts}
    bare = {name: row(concept, CLASS_WORD) for name, concept in concepts.items() if has_class_word(concept)}
    pictures = {
        (each.concept, each.pack): samples.find(concepts[each.concept], each.pack) for each in (*bare.values(), *rows)
    }
    photos = {name: measure_photos(one.photos, subjects[name], judge) for name, one in references.items()}
    return Evaluation(rows=_order_rows(packs, bare, rows), pictures=pictures, photos=photos)


def picture_count(packs: Packs, count: int) -> int:
    """Number of pictures that `evaluate_packs` samples; class words and kinds of the packs must be unified."""
    loaded = sum(len(pack.concepts) + len(_by_class_word([pack])) for pack in packs.values())
    return count * (len(_by_class_word(packs.values())) + loaded)


def record_rows(pack: EDLoRA, name: str, evaluation: Evaluation, settings: Mapping[str, object]) -> EDLoRA:
    """Return the pack with its measures added to its metadata, from which the model card takes them.

    Args:
        pack: One of the measured packs.
        name: The pack's name in the evaluation.
        evaluation: The measures.
        settings: How they were measured, JSON values.
    """
    rows = {row.concept: row.as_record() for row in evaluation.rows if row.pack == name and row.concept != MEAN}
    concepts = {
        concept: {key: value for key, value in row.items() if key not in ("concept", "pack")}
        for concept, row in rows.items()
    }
    return replace(pack, training={**pack.training, "evaluation": {**settings, "concepts": concepts}})


def _as_measured(packs: Mapping[str, EDLoRA | MeasuredPack]) -> dict[str, MeasuredPack]:
    """The packs, each with what of it is measured."""
    return {
        name: pack if isinstance(pack, MeasuredPack) else MeasuredPack.of(pack, name) for name, pack in packs.items()
    }


def _class_key(concept: Measurable) -> tuple[str, str]:
    """Class word and kind: concepts equal in both have the same prompts with the class word."""
    return concept.class_word, concept.kind


def _by_class_word(packs: Iterable[EDLoRA | MeasuredPack]) -> dict[tuple[str, str], Measurable]:
    """One concept for each known class word and kind."""
    return {_class_key(concept): concept for pack in packs for concept in pack.concepts if has_class_word(concept)}


class _Samples:
    """All sampled pictures, and the judge that measures them.

    `floors` has the base model's pictures by class word and kind, `alone` the packs' pictures by placeholder and pack.
    """

    def __init__(self, judge: Judge) -> None:
        self.judge = judge
        self.floors: dict[tuple[str, str], list[Image.Image]] = {}
        self.alone: dict[tuple[str, str], list[Image.Image]] = {}
        self._drifts: dict[tuple[str, tuple[str, str]], float] = {}

    def note_drift(self, pack: str, concept: Measurable, pictures: Sequence[Image.Image]) -> None:
        """Record how far a pack's pictures of a class word are from the base's."""
        base = self.judge.features(self.floors[_class_key(concept)])
        cosines = metrics.cosine_matrix(base, self.judge.features(pictures)).diagonal()
        self._drifts[pack, _class_key(concept)] = float((1 - cosines).mean())

    def find(self, concept: Measurable, pack: str) -> list[Image.Image]:
        """Find the pictures of a concept in a pack, or of its class word on the base."""
        return self.floors[_class_key(concept)] if pack == CLASS_WORD else self.alone[concept.placeholder, pack]

    def measure(self, concept: Measurable, pack: str, texts: Sequence[str], subjects: Mapping[str, Subject]) -> Row:
        """Measure the pictures of one concept in one pack."""
        pictures, subject = self.find(concept, pack), subjects.get(concept.placeholder)
        features = self.judge.features(pictures)
        identity = None if subject is None else measure_identity(pictures, subject, [*subjects.values()], self.judge)
        return Row(
            concept=concept.placeholder,
            pack=pack,
            text_alignment=metrics.clip_score(self.judge.text_features(texts), features),
            identity=identity,
            drift=self._drifts.get((pack, _class_key(concept))),
        )


def _order_rows(packs: Mapping[str, MeasuredPack], bare: Mapping[str, Row], rows: Sequence[Row]) -> tuple[Row, ...]:
    """Add retention to all rows and put them in order, with means of packs of several concepts last."""
    alone = find_own_packs(packs)
    own = {row.concept: row for row in rows if row.pack == alone.get(row.concept)}
    ordered: list[Row] = []
    for concept in dict.fromkeys(row.concept for row in rows):
        of_concept, floor = [row for row in rows if row.concept == concept], bare.get(concept)
        ordered += [floor] if floor is not None else []
        ordered += [_add_retention(row, own.get(concept), floor) for row in of_concept]
    means = []
    for name, pack in packs.items():
        names = [concept.placeholder for concept in pack.concepts]
        if len(names) > 1:
            own_mean = _average_rows([own[concept] for concept in names]) if own.keys() >= set(names) else None
            floor = _average_rows([bare[concept] for concept in names]) if bare.keys() >= set(names) else None
            averaged = [row for row in ordered if row.pack == name]
            means.append(_blank_undefined(_add_retention(_average_rows(averaged), own_mean, floor), averaged))
    return (*ordered, *means)


def _blank_undefined(mean: Row, averaged: Sequence[Row]) -> Row:
    """Leave no retention in a row of means where one of its concepts has none: tuning gained that one nothing."""
    if mean.retention is None:
        return mean
    undefined = {
        measure
        for row in averaged
        for measure, kept in (row.retention or {}).items()
        if kept is None and getattr(row.identity, measure) is not None
    }
    return replace(
        mean, retention={name: None if name in undefined else kept for name, kept in mean.retention.items()}
    )


def _add_retention(row: Row, own: Row | None, floor: Row | None) -> Row:
    """Add retention to a row, if the identities that it needs are known."""
    if own is None or own is row or floor is None:
        return row
    if row.identity is None or own.identity is None or floor.identity is None:
        return row
    return replace(row, retention=retention(row.identity, own.identity, floor.identity))


def _average_rows(rows: Sequence[Row]) -> Row:
    identities = [row.identity for row in rows if row.identity is not None]
    drifts = [row.drift for row in rows if row.drift is not None]
    return Row(
        concept=MEAN,
        pack=rows[0].pack,
        text_alignment=sum(row.text_alignment for row in rows) / len(rows),
        identity=mean_identity(identities) if len(identities) == len(rows) else None,
        drift=sum(drifts) / len(drifts) if drifts else None,
    )
