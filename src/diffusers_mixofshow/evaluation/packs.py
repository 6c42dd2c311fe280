"""Measuring packs: every concept of every pack with the same prompts and seeds, beside its class word on the base."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from PIL import Image

from diffusers_mixofshow.concepts import Concept
from diffusers_mixofshow.edlora import EDLoRA
from diffusers_mixofshow.evaluation import metrics
from diffusers_mixofshow.evaluation.agreement import own_packs, unify_concepts
from diffusers_mixofshow.evaluation.identity import (
    Identity,
    Judge,
    Subject,
    mean_identity,
    measure_identity,
    retention,
)
from diffusers_mixofshow.evaluation.sampling import ON_PICTURES, Sampling, fill_templates, sample_pictures


CLASS_WORD = "class word"
"""Stands for a pack in the rows of the base, which is prompted with the concept's class word: the floor."""

MEAN = "mean"
"""Stands for a concept in the rows of means over a pack's concepts."""

TEMPLATES = Callable[[Concept], Sequence[str]]
"""Prompt templates with ``<TOK>`` for a concept."""


@dataclass(frozen=True, kw_only=True)
class Reference:
    """What a concept looks like.

    Args:
        photos: Photos of it, at least one.
        attributes: What the judge should read off pictures of it; empty where it is not known.
    """

    photos: Sequence[Image.Image]
    attributes: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One concept in one pack.

    Args:
        concept: Its placeholder, or `MEAN`.
        pack: The pack's name, or `CLASS_WORD`.
        text_alignment: CLIPScore of its pictures and their prompts, the class word in the concept's place.
        identity: How well its pictures show it; None without photos.
        retention: Share of what the concept's own ED-LoRA gained over the class word that this pack keeps, for every
            measure; None where its own is not among the packs, or is this one.
        drift: 1 - cosine of the base's pictures of the class word and the same with the pack loaded, equal seeds.
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
    """All rows, concept by concept, means last; and the pictures that they are measured on.

    Args:
        rows: The numbers.
        pictures: Concept and pack to pictures.
    """

    rows: tuple[Row, ...]
    pictures: Mapping[tuple[str, str], Sequence[Image.Image]]


def evaluate_packs(
    pipe: Any,
    packs: Mapping[str, EDLoRA],
    judge: Judge,
    references: Mapping[str, Reference],
    *,
    templates: TEMPLATES,
    sampling: Sampling,
    count: int,
    advance: ON_PICTURES = lambda pictures: None,
) -> Evaluation:
    """Measure every concept of every pack.

    The first pack that holds a concept alone is the concept's own ED-LoRA, which retention in the others refers to,
    and which tells its class word and kind where packs differ, see `agreed`.

    Args:
        pipe: The base as a Mix-of-Show pipeline, no concept loaded; it leaves so.
        packs: Name to pack.
        judge: Who looks at the pictures.
        references: Placeholder to photos; concepts without get their text-alignment alone.
        templates: Prompts of a concept.
        sampling: How pictures are sampled.
        count: Pictures of each concept in each pack.
        advance: Told how many pictures were finished, of `picture_count`.
    """
    drawn, packs = _Drawn(judge), unify_concepts(packs)

    def sample(concept: Concept, subject: str) -> list[Image.Image]:
        return sample_pictures(pipe, fill_templates(templates(concept), subject, count), sampling, advance=advance)

    for concept in _by_class_word(packs.values()).values():
        drawn.floors[_plain(concept)] = sample(concept, concept.class_word)
    for name, pack in packs.items():
        with _load_pack(pipe, pack):
            for concept in pack.concepts:
                drawn.alone[concept.placeholder, name] = sample(concept, concept.placeholder)
            for concept in _by_class_word([pack]).values():
                drawn.note_drift(name, concept, sample(concept, concept.class_word))
    subjects = {
        placeholder: Subject(name=placeholder, photos=judge.features(one.photos), attributes=one.attributes)
        for placeholder, one in references.items()
    }

    def row(concept: Concept, name: str) -> Row:
        texts = fill_templates(templates(concept), concept.class_word, count)
        return drawn.row(concept, name, texts, subjects)

    rows = [row(concept, name) for name, pack in packs.items() for concept in pack.concepts]
    concepts = {concept.placeholder: concept for pack in packs.values() for concept in pack.concepts}
    bare = {placeholder: row(concept, CLASS_WORD) for placeholder, concept in concepts.items()}
    pictures = {
        (each.concept, each.pack): drawn.of(concepts[each.concept], each.pack) for each in (*bare.values(), *rows)
    }
    return Evaluation(rows=_with_retention(packs, bare, rows), pictures=pictures)


def picture_count(packs: Mapping[str, EDLoRA], count: int) -> int:
    """How many pictures `evaluate_packs` samples with `count` of each concept in each pack; of packs that agree."""
    loaded = sum(len(pack.concepts) + len(_by_class_word([pack])) for pack in packs.values())
    return count * (len(_by_class_word(packs.values())) + loaded)


def note_rows(pack: EDLoRA, name: str, evaluation: Evaluation, settings: Mapping[str, object]) -> EDLoRA:
    """The pack with its own rows among what its file tells of it, where the model card finds them.

    Args:
        pack: One of those measured.
        name: Its name in the evaluation.
        evaluation: The numbers.
        settings: How they were measured, JSON values.
    """
    rows = {row.concept: row.as_record() for row in evaluation.rows if row.pack == name and row.concept != MEAN}
    concepts = {
        concept: {key: value for key, value in row.items() if key not in ("concept", "pack")}
        for concept, row in rows.items()
    }
    return replace(pack, training={**pack.training, "evaluation": {**settings, "concepts": concepts}})


def _plain(concept: Concept) -> tuple[str, str]:
    """What decides about a concept's prompts with its class word."""
    return concept.class_word, concept.kind


def _by_class_word(packs: Iterable[EDLoRA]) -> dict[tuple[str, str], Concept]:
    """One concept for each class word and kind."""
    return {_plain(concept): concept for pack in packs for concept in pack.concepts}


class _Drawn:
    """What was sampled, and who looks at it."""

    def __init__(self, judge: Judge) -> None:
        self.judge = judge
        self.floors: dict[tuple[str, str], list[Image.Image]] = {}
        self.alone: dict[tuple[str, str], list[Image.Image]] = {}
        self._drifts: dict[tuple[str, tuple[str, str]], float] = {}

    def note_drift(self, pack: str, concept: Concept, pictures: Sequence[Image.Image]) -> None:
        """Compare a pack's pictures of a class word with the base's."""
        base = self.judge.features(self.floors[_plain(concept)])
        cosines = metrics.cosine_matrix(base, self.judge.features(pictures)).diagonal()
        self._drifts[pack, _plain(concept)] = float((1 - cosines).mean())

    def of(self, concept: Concept, pack: str) -> list[Image.Image]:
        """Pictures of a concept, or of its class word on the base."""
        return self.floors[_plain(concept)] if pack == CLASS_WORD else self.alone[concept.placeholder, pack]

    def row(self, concept: Concept, pack: str, texts: Sequence[str], subjects: Mapping[str, Subject]) -> Row:
        """Measure the pictures of one concept in one pack."""
        pictures, subject = self.of(concept, pack), subjects.get(concept.placeholder)
        features = self.judge.features(pictures)
        identity = None if subject is None else measure_identity(pictures, subject, [*subjects.values()], self.judge)
        return Row(
            concept=concept.placeholder,
            pack=pack,
            text_alignment=metrics.clip_score(self.judge.text_features(texts), features),
            identity=identity,
            drift=self._drifts.get((pack, _plain(concept))),
        )


@contextmanager
def _load_pack(pipe: Any, pack: EDLoRA) -> Iterator[None]:
    pipe.load_edlora(pack)
    try:
        yield
    finally:
        pipe.unload_edlora()


def _with_retention(packs: Mapping[str, EDLoRA], bare: Mapping[str, Row], rows: Sequence[Row]) -> tuple[Row, ...]:
    """All rows in their final order, the means of packs with several concepts last."""
    alone = own_packs(packs)
    own = {row.concept: row for row in rows if row.pack == alone.get(row.concept)}
    ordered: list[Row] = []
    for concept, floor in bare.items():
        of_concept = [row for row in rows if row.concept == concept]
        ordered += [floor, *(_add_retention(row, own.get(concept), floor) for row in of_concept)]
    means = []
    for name, pack in packs.items():
        names = [concept.placeholder for concept in pack.concepts]
        if len(names) > 1:
            own_mean = _mean([own[concept] for concept in names]) if own.keys() >= set(names) else None
            floor = _mean([bare[concept] for concept in names])
            means.append(_add_retention(_mean([row for row in rows if row.pack == name]), own_mean, floor))
    return (*ordered, *means)


def _add_retention(row: Row, own: Row | None, floor: Row) -> Row:
    """The row with its retention, where there is what that needs."""
    if own is None or own is row or row.identity is None or own.identity is None or floor.identity is None:
        return row
    return replace(row, retention=retention(row.identity, own.identity, floor.identity))


def _mean(rows: Sequence[Row]) -> Row:
    identities = [row.identity for row in rows if row.identity is not None]
    drifts = [row.drift for row in rows if row.drift is not None]
    return Row(
        concept=MEAN,
        pack=rows[0].pack,
        text_alignment=sum(row.text_alignment for row in rows) / len(rows),
        identity=mean_identity(identities) if len(identities) == len(rows) else None,
        drift=sum(drifts) / len(drifts) if drifts else None,
    )
