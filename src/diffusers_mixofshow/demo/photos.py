"""Stage one of the demo: photos of every concept on disk, drawn or the user's own."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageOps

from diffusers_mixofshow import toyland
from diffusers_mixofshow.concepts import Concept
from diffusers_mixofshow.demo.settings import OWN_NAME, DemoConcept, DemoSettings
from diffusers_mixofshow.errors import ConfigurationError
from diffusers_mixofshow.evaluation.toyland_judge import hidden_attributes
from diffusers_mixofshow.toyland.concepts import KIND_OF_CLASS, find_concept
from diffusers_mixofshow.toyland.world import HEIGHT
from diffusers_mixofshow.training.data import Photo, read_photos


def prepare_photos(settings: DemoSettings) -> list[DemoConcept]:
    """Write the photos of every concept to ``folder/photos/NAME`` and return the concepts.

    Raises:
        ConfigurationError: If the base does not know the class of the user's photos.
        TrainingDataError: If the user's photos cannot be used.
    """
    own = read_own(settings)
    concepts = [_draw_concept(name, settings) for name in settings.concepts]
    if own is None:
        return concepts
    return _replace_by_own(concepts, _copy_own(*own, settings.folder / "photos" / OWN_NAME))


def read_own(settings: DemoSettings) -> tuple[Concept, list[Photo]] | None:
    """Read the user's own concept and photos; None without any. Raises as `prepare_photos` does."""
    if settings.photos is None or settings.class_word is None:
        return None
    class_word = settings.class_word.strip().lower()
    if class_word not in KIND_OF_CLASS:
        raise ConfigurationError(
            f"The embedded base does not know what a {class_word!r} is. It knows: {', '.join(KIND_OF_CLASS)}. "
            "For anything else, use `mixofshow train` with a Stable Diffusion base."
        )
    concept = Concept.from_name(OWN_NAME, class_word, kind=KIND_OF_CLASS[class_word])
    return concept, read_photos(settings.photos, concept)


def read_photo_images(concept: DemoConcept) -> list[Image.Image]:
    """Read the pictures of a concept's photos, in the order of their names."""
    spelt = Concept.from_name(concept.name, concept.class_word, kind=concept.kind)
    return [photo.image for photo in read_photos(concept.folder, spelt)]


def _draw_concept(name: str, settings: DemoSettings) -> DemoConcept:
    concept = find_concept(name)
    folder = settings.folder / "photos" / name
    toyland.write_photos(concept, folder, count=settings.photo_count, seed=settings.seed)
    return DemoConcept(
        name=name,
        kind=concept.kind,
        class_word=concept.class_word,
        folder=folder,
        attributes=hidden_attributes(concept),
    )


def _copy_own(concept: Concept, photos: Sequence[Photo], folder: Path) -> DemoConcept:
    """Copy the user's photos, cropped to Toyland's square, with their captions and masks."""
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "masks").mkdir(parents=True)
    size = (HEIGHT, HEIGHT)
    stems = [photo.path.stem for photo in photos]
    for photo, stem in zip(photos, stems, strict=True):
        # Photos in different subfolders may have the same name.
        name = stem if stems.count(stem) == 1 else f"{photo.path.parent.name}-{stem}"
        ImageOps.fit(photo.image, size, Image.Resampling.LANCZOS).save(folder / f"{name}.png")
        captions = [" ".join(caption.split()) for caption in photo.captions]  # in the file, a line is a caption
        (folder / f"{name}.txt").write_text("\n".join(captions) + "\n", encoding="utf-8")
        if photo.mask is not None:
            ImageOps.fit(photo.mask, size, Image.Resampling.BOX).save(folder / "masks" / f"{name}.png")
    return DemoConcept(name=OWN_NAME, kind=concept.kind, class_word=concept.class_word, folder=folder)


def _replace_by_own(concepts: list[DemoConcept], own: DemoConcept) -> list[DemoConcept]:
    """Replace the last concept of the same class, else the last of all, by the user's own."""
    same = [index for index, concept in enumerate(concepts) if concept.class_word == own.class_word]
    place = same[-1] if same else len(concepts) - 1
    return [*concepts[:place], own, *concepts[place + 1 :]]
