"""The tensors of a LoRA file in any spelling, sorted into layers; what of them no low-rank update can say is told."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from diffusers_mixofshow.edlora import stock
from diffusers_mixofshow.edlora.defects import content_defects, listed
from diffusers_mixofshow.edlora.low_rank import LowRank
from diffusers_mixofshow.families.recognition import families_with, is_linear_site, is_original_alone
from diffusers_mixofshow.interop.lycoris import with_halves
from diffusers_mixofshow.interop.names import Spelling, adapter_of, half_of, site_of, spelling_of
from diffusers_mixofshow.interop.original_code import in_diffusers
from diffusers_mixofshow.interop.other_kinds import OtherKind, other_base, other_kind, other_method
from diffusers_mixofshow.interop.peft_settings import PEFT_CONFIG, PeftSettings, settings_beside, settings_in_header
from diffusers_mixofshow.interop.tensors import in_working_dtype


_BUNDLED = re.compile(r"bundle_emb\.(?P<name>.+?)\.(?P<vectors>string_to_param\.\*|emb_params|clip_l|clip_g)")
_OWN = "its own tensors"
_NOT_TOLD = "not told, taken as the rank"
_NOT_KNOWN = (
    f"alpha is not known: PEFT keeps it in {PEFT_CONFIG}, which is not beside it or does not say it. Put it there, or "
    'a file of this name with {"lora_alpha": 8}, or whatever the number was'
)
_WHOLE = "whole weights, as of a checkpoint, where a LoRA has pairs of matrices"
_KOHYAS = "ss_network_alpha"
_LOST = "but the alphas that belong to it are missing; taken as the rank, as every program then does"
_SORTED = (
    "several patterns give these layers' alphas; the first was taken, as PEFT takes it, but it sorts patterns when it "
    "saves, so that in training it may have been another"
)
_ASSUMED = (
    "alpha is not in this file, whose header has lost PEFT's settings or never had them; taken as the rank, as "
    f"diffusers takes it. If it was another, put {PEFT_CONFIG} beside it"
)


@dataclass(frozen=True, kw_only=True)
class LoRAContent:
    """What a LoRA file holds, sound or not.

    Args:
        lora: Site name to update, of all layers that are sound.
        spelling: Whose names it has; None where no tensor is half of a LoRA.
        bundled: Name of an embedding that is packed into the file to text encoder (``clip_l``, ``clip_g``) to
            its vectors, shape (vectors, dim).
        metadata: The file's own.
        alpha_from: Where the layers' alphas come from, in words; empty without updates.
        remarks: What had to be assumed that no program's convention tells, each as a sentence.
        defects: What of it cannot be used.
    """

    lora: Mapping[str, LowRank]
    spelling: Spelling | None
    bundled: Mapping[str, Mapping[str, torch.Tensor]]
    metadata: Mapping[str, str]
    alpha_from: str
    remarks: tuple[str, ...]
    defects: tuple[str, ...]


@dataclass
class _Layer:
    """What a file says of one layer.

    Args:
        name: As the file spells it.
        spelling: Whose name its halves have.
        adapters: Adapters' own names in theirs.
        halves: Whichever of ``down`` and ``up`` there are.
        alpha: Its own, if it has one.
    """

    name: str
    spelling: Spelling = Spelling.DIFFUSERS
    adapters: set[str] = field(default_factory=set)
    halves: dict[str, torch.Tensor] = field(default_factory=dict)
    alpha: float | None = None


@dataclass
class _Sorted:
    """A file's tensors.

    Args:
        layers: Site name to its layer.
        bundled: As in `LoRAContent`.
        refused: Why something cannot be used, to the names of its tensors or layers.
        strange: Sites with tensors of another kind.
        unknown: Tensors that are still without a meaning.
    """

    layers: dict[str, _Layer] = field(default_factory=dict)
    bundled: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)
    refused: dict[str, list[str]] = field(default_factory=dict)
    strange: set[str] = field(default_factory=set)
    unknown: list[str] = field(default_factory=list)

    def layer(self, name: str) -> _Layer:
        """The layer of this name, which the file may also have spelt in another way."""
        return self.layers.setdefault(site_of(name), _Layer(name))

    def refuse(self, reason: str, name: str) -> None:
        """Note that something cannot be used."""
        self.refused.setdefault(reason, []).append(name)

    def refuse_kind(self, kind: OtherKind, name: str) -> None:
        """Note a tensor of another kind, and the layer that it makes one of."""
        self.refuse(kind.told, name)
        self.strange.add(site_of(kind.layer))


def content_of(
    tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str], path: Path | None = None
) -> LoRAContent:
    """Sort the tensors of a LoRA file.

    Args:
        tensors: Name to tensor, as in the file.
        metadata: The file's own.
        path: The file, beside which PEFT's settings lie.
    """
    tensors = with_halves(tensors)
    settings = settings_in_header(metadata)
    if settings is None:
        # In a folder of downloads they are another's, unless the tensors have PEFT's names.
        in_pefts_names = any(adapter_of(name) is not None for name in tensors)
        settings = settings_beside(path) if path is not None and in_pefts_names else PeftSettings()
    found = _sort(tensors)
    for settle in (_settle_unknown, _settle_bases, _settle_adapters):
        settle(found)
    lora: dict[str, LowRank] = {}
    origins: dict[str, str] = {}
    for site, layer in found.layers.items():
        if fault := _fault(site, layer):
            found.refuse(fault, site)
        else:
            # The header speaks of diffusers' layers.
            silent = stock.KEY in metadata and is_original_alone(site)
            lora[site], origins[site] = _update(site, layer, PeftSettings() if silent else settings)
    by_settings = {site: update.rank for site, update in lora.items() if origins[site] == settings.place}
    untold = {site: found.layers[site].spelling for site, origin in origins.items() if origin == _NOT_TOLD}
    remarks = _list_assumptions(untold, {lora[site].rank for site in untold}, metadata)
    if unsure := settings.ambiguous(by_settings):
        remarks.append(f"{_SORTED}: {listed(unsure)}")
    defects = [*settings.defects, *settings.misfits(by_settings)]
    of_diffusers_model = Spelling.ORIGINAL not in untold.values()  # whose alphas are the ranks
    defects += [_NOT_KNOWN] if Spelling.PEFT in untold.values() and of_diffusers_model else []
    defects += [f"{reason}: {listed(names)}" for reason, names in found.refused.items()]
    lora, misfits = in_diffusers(lora)
    defects += [*misfits, *(content_defects((), {}, lora, ()) if lora else [])]
    if not lora and not defects:
        defects.append("no tensor of it belongs to a layer of a text encoder, U-Net or transformer")
    spellings = Counter(spelling_of(name) for name in tensors if half_of(name))
    return LoRAContent(
        lora=lora,
        spelling=spellings.most_common(1)[0][0] if spellings else None,
        bundled=found.bundled,
        metadata=metadata,
        alpha_from=_count(origins.values()),
        remarks=tuple(remarks),
        defects=tuple(defects),
    )


def _sort(tensors: Mapping[str, torch.Tensor]) -> _Sorted:
    """Sort tensors into layers by site and bundled embeddings; note what cannot be said as a LoRA."""
    found = _Sorted()
    for name, tensor in tensors.items():
        half, embedding = half_of(name), _BUNDLED.fullmatch(name)
        if kind := other_kind(name):
            found.refuse_kind(kind, name)
        elif half is not None:
            layer = found.layer(half[0])
            if half[1] in layer.halves:
                found.refuse("layers given twice", name)
            layer.halves[half[1]] = tensor
            layer.spelling = spelling_of(name)
            layer.adapters.add(adapter_of(name) or "")
        elif name.endswith(".alpha") and tensor.numel() == 1:
            found.layer(name.removesuffix(".alpha")).alpha = float(tensor)
        elif embedding is not None and tensor.dim() in (1, 2) and tensor.numel() and tensor.is_floating_point():
            encoder = "clip_g" if embedding["vectors"] == "clip_g" else "clip_l"
            rows = in_working_dtype(tensor).reshape(-1, tensor.shape[-1])
            found.bundled.setdefault(embedding["name"], {})[encoder] = rows
        else:
            found.unknown.append(name)
    return found


def _settle_unknown(found: _Sorted) -> None:
    """Tell what the other tensors are; alphas and weights of layers of another kind are told with them."""
    for name in found.unknown:
        if kind := other_method(name):
            found.refuse_kind(kind, name)
    told = {name for names in found.refused.values() for name in names}
    for name in found.unknown:
        if name not in told and site_of(name.rpartition(".")[0]) not in found.strange:
            whole = name.endswith((".weight", ".bias")) and _is_of_known(name)
            found.refuse(_WHOLE if whole else "tensors of no known meaning", name)
    found.layers = {site: layer for site, layer in found.layers.items() if layer.halves or site not in found.strange}


def _settle_bases(found: _Sorted) -> None:
    """Tell which other base a file was made for, if it was, by layers and tensors that no family here has."""
    unfit = {layer.name: site for site, layer in found.layers.items() if not _is_known(site)}
    transformer = {layer.name: site for site, layer in found.layers.items() if site.startswith("transformer.")}
    if any(re.search(r"\.\d+\.", site) for site in unfit.values()) or _reads_another_text(found, transformer.values()):
        unfit |= transformer  # whose blocks are another model's, though some layers are called like a known one's
    refused = (name for names in found.refused.values() for name in names if not _is_of_known(name))
    base, names = other_base([*unfit, *refused])
    for name in names:
        found.refuse(f"made for {base}, with layers that no supported base has", name)
        found.layers.pop(unfit.get(name, ""), None)


def _reads_another_text(found: _Sorted, sites: Iterable[str]) -> bool:
    """Whether layers are called like those of one known transformer but do not show that they read its text.

    Transformers with cross-attention are called alike in diffusers, whatever base they are of.
    """
    widths = {model.text_width for family in families_with(sites) for model in family.models}
    if not widths or 0 in widths:
        return False
    reading = {
        layer.halves["down"].shape[-1]
        for site, layer in found.layers.items()
        if re.search(r"\.attn2\.to_[kv]$", site) and "down" in layer.halves
    }
    return not reading or not reading <= widths


def _settle_adapters(found: _Sorted) -> None:
    """Several adapters in one component cannot be told apart: which of them is meant is not known."""
    adapters: dict[str, set[str]] = {}
    for site, layer in found.layers.items():
        adapters.setdefault(site.partition(".")[0], set()).update(layer.adapters)
    for names in adapters.values():
        for name in sorted(names) if len(names) > 1 else ():
            found.refuse("several adapters in one file, of which one is to be taken out", name or "without a name")


def _fault(site: str, layer: _Layer) -> str:
    """Why a layer is no update of a linear layer or 1 x 1 convolution; empty if it is one."""
    if not layer.halves:
        return "alphas without matrices"
    if len(layer.halves) < 2:
        return "one half without the other, so not a pair of matrices"
    down, up = layer.halves["down"], layer.halves["up"]
    flat = all(half.dim() == 2 or half.shape[2:] == (1, 1) for half in (down, up))
    if not flat or not 1 <= down.shape[0] == up.shape[1]:
        return "not a pair of matrices of a linear layer or 1 x 1 convolution"
    if not _is_known(site):
        return "layers that are not supported, which are those of attention, feed-forward parts and projections"
    return ""


def _is_known(site: str) -> bool:
    """Whether some family has a linear layer of this name, in diffusers or in its original code."""
    return is_linear_site(site) or is_original_alone(site)


def _is_of_known(name: str) -> bool:
    """Whether a tensor of any kind belongs to such a layer, which its name says but for the last one or two words."""
    owner = name.rpartition(".")[0]
    return any(_is_known(site_of(layer)) for layer in (owner, owner.rpartition(".")[0]) if layer)


def _update(site: str, layer: _Layer, settings: PeftSettings) -> tuple[LowRank, str]:
    """A sound layer's update, and where its alpha comes from."""
    down, up = (in_working_dtype(layer.halves[half]) for half in ("down", "up"))
    rank = down.shape[0]
    alpha, origin = layer.alpha, _OWN
    if alpha is None:
        alpha, origin = settings.alpha(site, rank), settings.place
    if alpha is None:
        alpha, origin = float(rank), _NOT_TOLD
    return LowRank.from_file(down, up, alpha), origin


def _list_assumptions(untold: Mapping[str, Spelling], ranks: set[int], metadata: Mapping[str, str]) -> list[str]:
    """What was assumed of sites without an alpha, of these spellings and ranks, that is no program's convention."""
    remarks = [_ASSUMED] if Spelling.ONE_MODEL in untold.values() else []
    told = metadata.get(_KOHYAS, "")
    if untold and re.fullmatch(r"\d{1,6}(\.\d{1,6})?", told) and float(told) not in ranks:
        remarks.append(f"its header says {_KOHYAS}={told}, {_LOST}")
    return remarks


def _count(origins: Iterable[str]) -> str:
    counts = Counter(origins)
    return ", ".join(origin if len(counts) == 1 else f"{origin} ({count} layers)" for origin, count in counts.items())
