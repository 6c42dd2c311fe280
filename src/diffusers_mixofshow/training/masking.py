"""Make masks for photos that have none, at the paths where training looks for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from diffusers_mixofshow.atomic import check_outputs, write_picture
from diffusers_mixofshow.errors import ConfigurationError, PictureError, TrainingDataError, warn
from diffusers_mixofshow.masks import read_alpha
from diffusers_mixofshow.progress import progress
from diffusers_mixofshow.sheets import draw_labelled_sheet
from diffusers_mixofshow.training.finding import DEFAULT_FINDER, Finder
from diffusers_mixofshow.training.folders import MASK_FOLDERS, Listing, join_remarks, list_folder
from diffusers_mixofshow.training.outlines import Outline, outline
from diffusers_mixofshow.training.pictures import read_visible


_THUMBNAIL = 160
"""Longest side of the sheet's pictures, in pixels."""


@dataclass(frozen=True, kw_only=True)
class MaskPlan:
    """Which masks to make, and how.

    Args:
        folder: The folder that the photos' names are relative to.
        class_word: What the photos show.
        model: Hub id or folder of a CLIPSeg.
        threshold: See `outline`.
        todo: Pairs of a photo without a mask and the file for its mask.
        masked: Number of photos that have a mask.
        sheet: Picture file that will show all results; None for none.
    """

    folder: Path
    class_word: str
    model: str
    threshold: float
    todo: Sequence[tuple[Path, Path]]
    masked: int
    sheet: Path | None

    @property
    def writes(self) -> list[Path]:
        """Every file that may be written."""
        sheet = [self.sheet] if self.sheet is not None and self.todo else []
        return [mask for _, mask in self.todo] + sheet

    def name(self, path: Path) -> str:
        """A photo's path relative to the folder."""
        return path.relative_to(self.folder).as_posix()


@dataclass(frozen=True, kw_only=True)
class MadeMask:
    """The result for one photo.

    Args:
        photo: The photo.
        mask: The file that was written; None if nothing usable was found.
        share: Share of the photo that is inside, from 0 to 1.
        remark: What the user should check; empty if nothing.
    """

    photo: Path
    mask: Path | None
    share: float
    remark: str


def make_masks(
    folder: str | Path,
    class_word: str,
    *,
    model: str = DEFAULT_FINDER,
    threshold: float = 0.5,
    sheet: str | Path | None = None,
    overwrite: bool = False,
) -> list[MadeMask]:
    """Write a mask beside every photo that has none: ``masks/NAME.png``, white where the class word's subject is.

    Args:
        folder: Photos as training reads them. Those with a mask, or with an alpha channel that cuts them out, are
            skipped.
        class_word: Plain word for what they show, such as "dog"; of several in a photo the largest is taken.
        model: Hub id or folder of a CLIPSeg.
        threshold: Inside is where the likelihood is above this fraction of the photo's largest, between 0 and 1; a
            higher one makes smaller masks.
        sheet: PNG to write that shows every photo, its mask and the cut-out.
        overwrite: Whether masks of the same path are made anew, and the sheet may be replaced.

    Returns:
        One entry for each photo that had no mask, in the order of their names.

    Warns:
        MixOfShowWarning: Names the photos where nothing, nearly nothing, nearly everything or more than one was found;
            only the last ones get a mask.

    Raises:
        ConfigurationError: If there is no such folder or model, or a setting is out of range.
        TrainingDataError: Lists every file that cannot be used.
        OverwriteError: If the sheet exists and `overwrite` is False.
    """
    plan = plan_masks(folder, class_word, model=model, threshold=threshold, sheet=sheet, overwrite=overwrite)
    check_outputs(*plan.writes, overwrite=overwrite)
    return carry_out(plan)


def plan_masks(
    folder: str | Path, class_word: str, *, model: str, threshold: float, sheet: str | Path | None, overwrite: bool
) -> MaskPlan:
    """Plan which photos get a mask, without loading a model; see `make_masks`."""
    _check_settings(class_word, threshold)
    listing = list_folder(Path(folder))
    defects, todo = list(listing.defects), []
    for photo in listing.photos:
        place = _mask_folder(photo.parent) / f"{photo.stem}.png"
        try:
            if not _has_mask(listing, photo, unless=place if overwrite else None):
                todo.append((photo, place))
        except PictureError as error:
            defects.append(str(error))
    if defects:
        raise TrainingDataError(f"{listing.folder} cannot be used for masks: {'; '.join(defects)}.")
    if not listing.photos:
        raise TrainingDataError(f"{listing.folder} has no photos.")
    return MaskPlan(
        folder=listing.folder,
        class_word=class_word.strip(),
        model=model,
        threshold=threshold,
        todo=todo,
        masked=len(listing.photos) - len(todo),
        sheet=None if sheet is None else Path(sheet),
    )


def carry_out(plan: MaskPlan) -> list[MadeMask]:
    """Make the masks of a plan; the model is loaded only if there are any."""
    if not plan.todo:
        return []
    finder = Finder.load(plan.model)
    made: list[MadeMask] = []
    rows: dict[str, list[Image.Image]] = {}
    with progress("Masks", len(plan.todo)) as bar:
        for photo, place in plan.todo:
            image = read_visible(photo, called=plan.name(photo)).image
            found = outline(finder.likelihood(image, plan.class_word), image.size, threshold=plan.threshold)
            if not found.defect:
                write_picture(place, found.mask)
            mask = None if found.defect else place
            made.append(
                MadeMask(photo=photo, mask=mask, share=found.share, remark=found.defect or found.remark),
            )
            rows[_label(plan, made[-1])] = _draw_row(image, found)
            bar.update(1)
    if plan.sheet is not None:
        write_picture(plan.sheet, draw_labelled_sheet(rows, title="photo, mask, cut-out"))
    _warn_of_remarks(plan, made)
    return made


def _check_settings(class_word: str, threshold: float) -> None:
    defects = []
    if not class_word.strip():
        defects.append("class_word is empty; expected a plain word for what the photos show, such as 'dog'")
    if not 0 < threshold < 1:
        defects.append(f"threshold is {threshold:g}; expected a number above 0 and below 1")
    if defects:
        raise ConfigurationError(f"Masks: {'; '.join(defects)}.")


def _mask_folder(place: Path) -> Path:
    """The folder for masks beside photos: the existing one of `MASK_FOLDERS`, else ``masks``."""
    there = sorted(path for path in place.iterdir() if path.name.lower() in MASK_FOLDERS and path.is_dir())
    return there[0] if there else place / MASK_FOLDERS[0]


def _has_mask(listing: Listing, photo: Path, *, unless: Path | None) -> bool:
    """Whether training would find a mask of the photo, other than the file `unless`.

    Raises:
        PictureError: If the photo cannot be read.
    """
    picture = read_visible(photo, called=listing.name(photo))
    if set(listing.masks.get(photo, ())) - {unless}:
        return True
    if picture.alpha is None or picture.alpha.getextrema() == (0, 0):
        return False
    return read_alpha(picture.alpha, called=f"the alpha channel of {listing.name(photo)}") is not None


def _label(plan: MaskPlan, made: MadeMask) -> str:
    lines = [plan.name(made.photo), f"{made.share:.0%}"]
    return "\n".join([*lines, "no mask" if made.mask is None else "look here"] if made.remark else lines)


def _draw_row(image: Image.Image, found: Outline) -> list[Image.Image]:
    cut_out = Image.new("RGB", image.size, "magenta")
    cut_out.paste(image, mask=found.mask)
    shown = [image.copy(), found.mask.convert("RGB"), cut_out]
    for picture in shown:
        picture.thumbnail((_THUMBNAIL, _THUMBNAIL))
    return shown


def _warn_of_remarks(plan: MaskPlan, made: Sequence[MadeMask]) -> None:
    remarks = [
        f"{plan.name(each.photo)} {'got no mask' if each.mask is None else 'is unsure'}: {each.remark}"
        for each in made
        if each.remark
    ]
    if remarks:
        hint = "draw masks by hand there, or try another class word or threshold"
        warn(join_remarks(f"Masks of {plan.folder}", [*remarks, hint]))
