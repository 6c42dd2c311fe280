"""Sources of a fusion: ED-LoRAs and plain LoRAs with weights and recording prompts, checked before any work starts."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import nn

from diffusers_mixofshow.base_models import canonical_name
from diffusers_mixofshow.concepts import check_distinct
from diffusers_mixofshow.edlora import EDLoRA
from diffusers_mixofshow.edlora.defects import content_defects
from diffusers_mixofshow.edlora.file import PLAIN_NAME
from diffusers_mixofshow.edlora.fusion_record import CARRIED, find_plain_prompts
from diffusers_mixofshow.edlora.hub import commit_of, download, is_repo_id
from diffusers_mixofshow.edlora.low_rank import LowRank, input_widths
from diffusers_mixofshow.errors import EDLoRAFormatError, EDLoRANotFoundError, FusionError, warn
from diffusers_mixofshow.families import Family, family_of, family_of_sites
from diffusers_mixofshow.families.layers import cross_attention_layers
from diffusers_mixofshow.families.recognition import find_family_defect, is_of_another, list_families
from diffusers_mixofshow.fusion.prompts import PromptSet, prompts_of_trigger, recording_prompts
from diffusers_mixofshow.fusion.published import SourceStatistics
from diffusers_mixofshow.fusion.solvers import Factors
from diffusers_mixofshow.interop.opening import Opened, open_edlora


NAME = re.compile(r"<\w[\w.-]{0,99}>|\w[\w.,;()+&'-]{0,99}")
"""Allowed names of a source: a concept's placeholder, or a plain LoRA's label. Folders are named after it."""


@dataclass(frozen=True)
class FusionSource:
    """An ED-LoRA to fuse, with settings of its own.

    Args:
        source: An ED-LoRA, or a path or Hub id of one or of another program's file with embeddings.
        weight: Its share in the objective or the average, relative to the other sources.
        scale: Factor on all its updates.
        statistics: Its statistics, or a file of them; by default the file beside it, if there is one.
        opened: The file at `source` if it was read already; it is not read again.
    """

    source: EDLoRA | str | os.PathLike[str]
    weight: float = 1.0
    scale: float = 1.0
    statistics: SourceStatistics | str | os.PathLike[str] | None = None
    opened: Opened | None = field(default=None, repr=False, compare=False)


@dataclass(frozen=True)
class LoRASource:
    """A plain LoRA to fuse: it has no learnt embeddings and acts when its trigger words are in the prompt.

    Args:
        source: A file in the names of diffusers, PEFT or kohya / A1111, or a folder or Hub id with one.
        prompts: Recording prompts with its trigger words, such as ``photo of sks dog``; by default those that it was
            fused with, if it is a pack or a pack carries it, else made from the trigger words in the file's metadata,
            if it has any.
        weight: Its share in the objective or the average, relative to the other sources.
        scale: Factor on all its updates.
        name: Its name in reports; by default the one that it has in the pack that carries it, else the file's name, or
            its folder's for a file called as diffusers does. A pack that is given neither a name nor prompts keeps
            those of each LoRA that it was fused from.
        statistics: Its statistics, or a file of them; by default the file beside it, if there is one.
        opened: The file at `source` if it was read already; it is not read again.
    """

    source: str | os.PathLike[str]
    prompts: Sequence[str] = ()
    weight: float = 1.0
    scale: float = 1.0
    name: str = ""
    statistics: SourceStatistics | str | os.PathLike[str] | None = None
    opened: Opened | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Refuse a string as prompts, which would be iterated letter by letter."""
        if isinstance(self.prompts, str):
            raise FusionError(
                f"LoRASource({os.fspath(self.source)!r}) needs a list of prompts with its trigger words, such as "
                f"['photo of sks dog', 'sks dog on the beach'], got {self.prompts!r}."
            )

    @property
    def label(self) -> str:
        """Its name without spaces, and without the angle brackets that mark a concept."""
        path = Path(self.source)
        named = (path.parent if path.name == PLAIN_NAME else path).stem or path.stem
        return "_".join(re.split(r"[\s<>]+", self.name or named)).strip("_")


@dataclass(frozen=True, kw_only=True)
class Source:
    """One ED-LoRA to fuse: a single concept, or a pack of several that share their updates.

    Args:
        edlora: The ED-LoRA, its updates already multiplied by `scale`.
        prompts: Recording prompts by placeholder; for a plain LoRA by its name, or by those of what it was fused from.
        weight: Its share, relative to the other sources.
        scale: Factor on every update.
        origin: Path or Hub id that it was read from; empty for an `EDLoRA` object.
        file: The file that it was read from, on this disk or in the Hub's cache; None for an `EDLoRA` object.
        statistics: Statistics that were recorded with its own LoRA.
        own: The ED-LoRA before it was multiplied; None if only the product is known.
    """

    edlora: EDLoRA
    prompts: Mapping[str, tuple[str, ...]]
    weight: float = 1.0
    scale: float = 1.0
    origin: str = ""
    file: Path | None = None
    statistics: SourceStatistics | None = None
    own: EDLoRA | None = field(default=None, repr=False, compare=False)

    @property
    def base_model(self) -> str:
        """The base model that its file names, or else its statistics; empty if neither does."""
        return self.edlora.base_model or (self.statistics.base_model if self.statistics else "")

    @property
    def revision(self) -> str:
        """Commit that it was read at; empty if it did not come from the Hub."""
        return commit_of(self.file) if self.file is not None and is_repo_id(self.origin) else ""

    @property
    def home(self) -> Path | None:
        """File on this disk beside which its statistics can be kept; None for one in the Hub's cache."""
        return None if is_repo_id(self.origin) else self.file

    @property
    def name(self) -> str:
        """Placeholders of its concepts: ``<potter>``, or ``<potter>+<thanos>`` for a pack."""
        return "+".join(self.prompts)

    def factors(self, site: str, shape: tuple[int, int]) -> Factors:
        """Its update of a layer of (out_features, in_features) on the CPU, see `Factors.of`; rank 0 if it has none."""
        update = self.edlora.lora.get(site)
        if update is None:
            return Factors(down=torch.zeros(0, shape[1]).double(), up=torch.zeros(shape[0], 0).double())
        return Factors.of(update).to("cpu")

    def rescale(self, scale: float, *, weight: float) -> Source:
        """The source with this scale and weight, its updates multiplied accordingly.

        Raises:
            FusionError: If its own updates are not known, but only their products with 0.
        """
        if scale == self.scale:
            return replace(self, weight=weight)
        if self.own is None and self.scale == 0:
            raise FusionError(
                f"{self.name} is known only with its updates multiplied by 0, as its pack carries it; a scale of "
                f"{scale:g} needs the updates themselves. Keep the scale of 0, or give its own file instead."
            )
        own = self.own or scale_updates(self.edlora, 1 / self.scale)
        return replace(self, edlora=scale_updates(own, scale), own=own, weight=weight, scale=scale)

    @property
    def misfits(self) -> list[str]:
        """Why it has no statistics that belong to it; empty if it has."""
        if self.statistics is None:
            return [f"{self.name} has none"]
        if self.statistics.digest != self.edlora.digest:
            return [
                f"the statistics given with {self.name} are of another LoRA (SHA-256 {self.statistics.digest[:12]}, "
                f"this one {self.edlora.digest[:12]}{'' if self.scale == 1 else f' at scale {self.scale:g}'})"
            ]
        if missing := [placeholder for placeholder in self.prompts if placeholder not in self.statistics.concepts]:
            return [f"the statistics given with {self.name} lack {', '.join(missing)}"]
        return []


FusionInput = EDLoRA | FusionSource | LoRASource | Source | str | os.PathLike[str]


def shares(sources: Sequence[Source]) -> list[float]:
    """Weights of the sources as shares that sum to 1."""
    total = sum(source.weight for source in sources)
    return [source.weight / total for source in sources]


def gather(
    given: Sequence[FusionInput],
    components: Mapping[str, object] | None,
    *,
    prompts: PromptSet | None,
    weights: Sequence[float] | None = None,
    scales: Sequence[float] | None = None,
    recorded: bool = True,
) -> tuple[Source, ...]:
    """Read the ED-LoRAs and check that they can be fused with each other and with the model.

    Args:
        given: ED-LoRAs, or what `EDLoRA.from_pretrained` reads; a `Source` is not read again.
        components: ``pipeline.components`` of the model; None without a model.
        prompts: See `recording_prompts`.
        weights: Share of each, any positive numbers; by default the sources' own.
        scales: Factor on all updates of each; by default the sources' own.
        recorded: Whether the method needs statistics, so that a plain LoRA must have prompts to record.

    Raises:
        ConceptError: If concepts of several sources share names.
        FusionError: If anything does not fit; lists every defect.
    """
    if isinstance(given, str | os.PathLike | EDLoRA | FusionSource | LoRASource):
        raise FusionError(f"Expected a list of sources to fuse, got {given!r} alone. Put it in brackets.")
    unet = (components or {}).get("unet")
    layers = cross_attention_layers(unet) if isinstance(unet, nn.Module) else ()
    entries = [_enter(one, place) for place, one in enumerate(given, 1)]
    sources = [entry if isinstance(entry, Source) else _read(entry, prompts, layers, recorded) for entry in entries]
    weights = [entry.weight for entry in entries] if weights is None else weights
    scales = [entry.scale for entry in entries] if scales is None else scales
    unchecked = [source for source, one in zip(sources, given, strict=True) if components or one is not source]
    defects = [
        *_number_defects("weights", weights, len(sources), positive=True),
        *_number_defects("scales", scales, len(sources), positive=False),
        *mutual_defects(sources),
        *label_defects(sources),
        *_model_defects(unchecked, components),
    ]
    refuse_defects(defects)
    if not all(isinstance(one, Source) for one in given):  # of those the user was told when they were read
        warn_of_copies(sources)
        _warn_of_silent(sources)
    numbers = zip(sources, weights, scales, strict=True)
    return tuple(source.rescale(scale, weight=weight) for source, weight, scale in numbers)


def _enter(given: FusionInput, place: int) -> FusionSource | LoRASource | Source:
    """What was given as the source at a place, as one that has a weight and a scale."""
    if isinstance(given, FusionSource | LoRASource | Source):
        return given
    if isinstance(given, EDLoRA | str | os.PathLike):
        return FusionSource(given)
    raise FusionError(
        f"source {place} is {given!r}; expected an EDLoRA, a path or Hub id, a FusionSource or a LoRASource."
    )


def refuse_defects(defects: Sequence[str]) -> None:
    """Raise one `FusionError` that lists why LoRAs cannot be fused, if there is any reason."""
    if defects:
        raise FusionError("These LoRAs cannot be fused: " + "; ".join(defects))


def warn_of_copies(sources: Sequence[Source]) -> None:
    """Warn of sources that are the same LoRA under other names, which counts once for each of them."""
    groups: list[list[Source]] = []
    for source in sources:
        alike = next((group for group in groups if _are_copies(group[0].edlora.lora, source.edlora.lora)), None)
        if alike is None:
            groups.append([source])
        else:
            alike.append(source)
    for group in groups:
        if len(group) > 1:
            told = " and ".join(source.name for source in group)
            warn(f"{told} are the same LoRA by their content, which so counts {len(group)} times; give it once.")


def _warn_of_silent(sources: Sequence[Source]) -> None:
    """Warn of plain LoRAs without prompts, which only methods that record nothing take."""
    silent = [name for source in sources for name, texts in source.prompts.items() if not texts]
    if silent:
        warn(
            f"neither a file nor prompts tell what calls {', '.join(silent)}: the fused file will not name it. This "
            "method needs no prompts; those that are given are kept in the file and on its card."
        )


def _are_copies(one: Mapping[str, LowRank], other: Mapping[str, LowRank]) -> bool:
    return bool(one) and one.keys() == other.keys() and all(_are_equal(one[site], other[site]) for site in one)


def _are_equal(one: LowRank, other: LowRank) -> bool:
    """Whether two updates are equal but for a factor."""
    halves = ((one.down, other.down), (one.up, other.up))
    return all(mine.dtype == theirs.dtype and torch.equal(mine, theirs) for mine, theirs in halves)


def _read(
    entry: FusionSource | LoRASource, prompts: PromptSet | None, layers: tuple[str, ...], recorded: bool
) -> Source:
    """Read one source; its weight and scale are not applied yet."""
    if isinstance(entry.source, EDLoRA):
        return Source(edlora=entry.source, prompts=_prompts_of_pack(entry.source, prompts, recorded))
    plain = isinstance(entry, LoRASource) and entry.opened is None and _holds_plain(entry.source)
    opened = entry.opened or open_edlora(entry.source, layers=layers, weight_name=PLAIN_NAME if plain else None)
    opened.tell()
    edlora, place = opened.edlora, os.fspath(entry.source)
    if not edlora.concepts:
        own = _prompts_of_plain(entry if isinstance(entry, LoRASource) else LoRASource(place), opened, recorded)
    elif isinstance(entry, LoRASource):
        names = ", ".join(concept.placeholder for concept in edlora.concepts)
        raise FusionError(
            f"{place} is not a plain LoRA: it holds embeddings of {names}. Give it by itself, or as "
            f"FusionSource({place!r}); its prompts come from the fuser."
        )
    else:
        own = _prompts_of_pack(edlora, prompts, recorded)
    return Source(edlora=edlora, prompts=own, origin=place, file=opened.file)


def _holds_plain(source: str | os.PathLike[str]) -> bool:
    """Whether a folder or a repository holds a plain LoRA under its usual name, perhaps with embeddings beside it."""
    if not is_repo_id(source):
        return Path(source, PLAIN_NAME).is_file()
    try:
        return download(str(source), PLAIN_NAME).is_file()
    except EDLoRANotFoundError:
        return False


def prompts_of_concepts(edlora: EDLoRA, prompts: PromptSet | None = None) -> dict[str, tuple[str, ...]]:
    """Placeholder to recording prompts, see `recording_prompts`, of every concept; empty for a plain LoRA."""
    return {concept.placeholder: recording_prompts(concept, prompts) for concept in edlora.concepts}


def _prompts_of_pack(edlora: EDLoRA, prompts: PromptSet | None, recorded: bool) -> dict[str, tuple[str, ...]]:
    """Recording prompts of all concepts, and of the plain LoRAs that a pack was fused from by its untrusted record.

    If features are recorded, plain LoRAs without prompts are left out.
    """
    members = find_plain_prompts(edlora.training)
    known = {name: tuple(texts) for name, texts in members.items() if NAME.fullmatch(name) and (texts or not recorded)}
    return prompts_of_concepts(edlora, prompts) | known


def _prompts_of_plain(lora: LoRASource, opened: Opened, recorded: bool) -> dict[str, tuple[str, ...]]:
    """Recording prompts of a plain LoRA by its name, or by those of the LoRAs that it was fused from."""
    members = _prompts_of_pack(opened.edlora, None, recorded)
    if members and len(members) == len(opened.members) and not (lora.name or lora.prompts):
        return members
    given = lora.prompts or [text for texts in opened.members.values() for text in texts]
    needed = not given and (recorded or opened.tells_prompts)
    texts = _prompts_of_words(lora, opened.trigger_words) if needed else tuple(dict.fromkeys(given))
    return {_find_name(lora, opened): texts}


def _find_name(lora: LoRASource, opened: Opened) -> str:
    """The name of a plain LoRA: the one given, else that of one that a pack carries, else that of its file."""
    known = opened.members if CARRIED in opened.edlora.training else {}
    return next(iter(known)) if len(known) == 1 and not lora.name else lora.label


def _prompts_of_words(lora: LoRASource, words: Sequence[str]) -> tuple[str, ...]:
    """Recording prompts made of the trigger words in a LoRA's file."""
    if not words:
        raise FusionError(
            f"{os.fspath(lora.source)} is a plain LoRA, which acts by its trigger words, and its file names none; "
            f"give LoRASource({os.fspath(lora.source)!r}, prompts=['photo of sks dog', ...]), or the "
            "trigger words with --prompts on the command line."
        )
    prompts = prompts_of_trigger(words)
    warn(
        f"{lora.label} is recorded with prompts made of the trigger words in its file, "
        f"{', '.join(map(repr, words))}: {'; '.join(prompts[:3])}; ... Give prompts of your own if it has others."
    )
    return prompts


def label_defects(sources: Sequence[Source]) -> list[str]:
    """Why sources cannot be told apart, or not be kept in folders, by the names of the plain LoRAs among them."""
    labels = [name for source in sources for name in source.prompts or [""] if not name.startswith("<")]
    defects = []
    if twice := sorted({label for label in labels if labels.count(label) > 1}):
        remedy = "give each its own, name='...' (on the command line in a TOML file of sources)"
        defects.append(f"LoRAs with the same name: {', '.join(twice)}; {remedy}")
    if odd := [label for label in labels if label and not NAME.fullmatch(label)]:
        defects.append(f"LoRAs whose names cannot name a folder: {', '.join(map(repr, odd))}; give name='...'")
    return defects


def scale_updates(edlora: EDLoRA, scale: float) -> EDLoRA:
    """An ED-LoRA with all of its updates multiplied by a factor."""
    if scale == 1:
        return edlora
    updates = {site: replace(update, alpha=scale * update.alpha) for site, update in edlora.lora.items()}
    return replace(edlora, lora=updates)


def _number_defects(what: str, numbers: Sequence[float], count: int, *, positive: bool) -> list[str]:
    defects = []
    if len(numbers) != count:
        defects.append(f"got {len(numbers)} {what} for {count} LoRAs; give one for each")
    wrong = [number for number in numbers if not math.isfinite(number) or (positive and number <= 0)]
    if wrong:
        defects.append(f"{what} must be finite{' and above 0' if positive else ''}, got {wrong}")
    return defects


def mutual_defects(sources: Sequence[Source]) -> list[str]:
    """Why sources cannot be fused with each other: different bases or layers, or none given.

    Raises:
        ConceptError: If concepts share names; perhaps one source was given twice.
    """
    if not sources:
        return ["none was given; give at least one"]
    edloras = {source.name: source.edlora for source in sources}
    check_distinct(concept for source in sources for concept in source.edlora.concepts)
    defects = []
    # Plain LoRAs are not bound to the base that they were fused on: only concepts count.
    of_concepts = {name: edlora for name, edlora in edloras.items() if edlora.concepts}
    base_models = {name: edlora.base_model for name, edlora in of_concepts.items() if edlora.base_model}
    bases = {canonical_name(base): name for name, base in reversed(base_models.items())}
    if len(bases) > 1:
        tuned = ", ".join(f"{name} on {base!r}" for base, name in reversed(bases.items()))
        defects.append(f"they were tuned on different base models ({tuned}); tune them on the same one")
    if len({edlora.layers for edlora in edloras.values() if edlora.layers}) > 1:
        counts = ", ".join(f"{name} {len(edlora.layers)}" for name, edlora in edloras.items() if edlora.layers)
        defects.append(f"they name different cross-attention layers (numbers of layers: {counts})")
    if misfits := _size_defects(sources):
        defects.append(f"they were made for layers of different sizes ({', '.join(misfits[:3])})")
    common = family_of_sites([site for edlora in edloras.values() for site in edlora.lora])
    if not all(common.has_site(site) for edlora in edloras.values() for site in edlora.lora):
        defects.append(f"no family of base models has all of the layers that they change ({_list_families(sources)})")
    return defects


def _size_defects(sources: Sequence[Source]) -> list[str]:
    sizes: dict[str, dict[tuple[int, int], str]] = {}
    for source in sources:
        for site, update in source.edlora.lora.items():
            if update.up.dim() == update.down.dim() == 2:
                sizes.setdefault(site, {})[update.up.shape[0], update.down.shape[1]] = source.name
    return [
        f"{site}: " + ", ".join(f"{name} {size}" for size, name in found.items())
        for site, found in sizes.items()
        if len(found) > 1
    ]


def _model_defects(sources: Sequence[Source], components: Mapping[str, object] | None) -> list[str]:
    """Defects of each source by itself or, if there is a model, in combination with the model."""
    defects = []
    if components is None:
        for source in sources:
            edlora, called = source.edlora, f"the {'ED-LoRA' if source.edlora.concepts else 'LoRA'} of {source.name}"
            inner = content_defects(edlora.concepts, edlora.embeddings, edlora.lora, edlora.layers)
            defects += [f"{called} is defective: {defect}" for defect in inner]
        return defects
    family = family_of(components)
    for source in sources:
        if is_of_another(input_widths(source.edlora.lora), family):
            continue
        try:
            source.edlora.check_fits(components)
        except EDLoRAFormatError as error:
            defects.append(str(error) if source.edlora.concepts else f"{source.name}: {error}")
    return [*defects, *_family_defects(sources, family)]


def refuse_other_family(sources: Sequence[Source], family: Family) -> None:
    """Raise a `FusionError` if sources were made for another family than that of the base model."""
    refuse_defects(_family_defects(sources, family))


def _family_defects(sources: Sequence[Source], family: Family) -> list[str]:
    defect = find_family_defect({source.name: input_widths(source.edlora.lora) for source in sources}, family)
    return [defect] if defect else []


def _list_families(sources: Sequence[Source]) -> str:
    return list_families({source.name: input_widths(source.edlora.lora) for source in sources})
