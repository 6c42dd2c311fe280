"""Sort the tensors of a LoRA file, in any naming scheme, into low-rank updates; report everything else as defects."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from diffusers_mixofshow.edlora import stock
from diffusers_mixofshow.edlora.defects import content_defects, is_showable, list_names
from diffusers_mixofshow.edlora.low_rank import LowRank, input_widths
from diffusers_mixofshow.families.recognition import families_with, is_linear_site, is_only_original, recognise
from diffusers_mixofshow.interop.lycoris import convert_to_halves, list_products
from diffusers_mixofshow.interop.names import Spelling, adapter_of, half_of, site_of, spelling_of
from diffusers_mixofshow.interop.original_code import to_diffusers
from diffusers_mixofshow.interop.other_kinds import OtherKind, other_base, other_kind, other_method
from diffusers_mixofshow.interop.peft_settings import PEFT_CONFIG, PeftSettings, settings_beside, settings_in_header
from diffusers_mixofshow.interop.tensors import to_working_dtype


_BUNDLED = re.compile(r"bundle_emb\.(?P<name>.+?)\.(?P<vectors>string_to_param\.\*|emb_params|clip_l|clip_g)")
_OWN = "its own tensors"
_NOT_TOLD = "not in the file, taken as the rank"
_NOT_KNOWN = (
    f"alpha is not known: PEFT keeps it in {PEFT_CONFIG}, which is missing beside it or does not contain it. Put it "
    'there, or a file of this name with {"lora_alpha": 8}, or whatever the value was'
)
_WHOLE = "full weights, as in a checkpoint, where a LoRA has pairs of matrices"
_KOHYAS = "ss_network_alpha"
_LOST = "but the alphas are missing; taken as the rank, as every program does in that case"
_SORTED = (
    "several patterns match these layers' alphas; the first is used, as in PEFT, but PEFT sorts patterns when it "
    "saves, so training may have used another"
)
_ASSUMED = (
    "alpha is not in this file, whose header does not have PEFT's settings; taken as the rank, as diffusers does. If "
    f"it was another, put {PEFT_CONFIG} beside the file"
)


@dataclass(frozen=True, kw_only=True)
class LoRAContent:
    """Content of a LoRA file, including its defects.

    Args:
        lora: Site name to update, for all valid layers.
        spelling: Naming scheme of the file; None if no tensor is half of a LoRA.
        bundled: Name of an embedding that is packed into the file to text encoder (``clip_l``, ``clip_g``) to
            its vectors, shape (vectors, dim).
        metadata: Metadata of the file.
        alpha_from: Where the layers' alphas come from, in words; empty without updates.
        remarks: Assumptions that no program's convention decides, each as a sentence.
        defects: Why parts of it cannot be used.
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
    """Tensors of one layer in a file.

    Args:
        name: The layer's name in the file.
        spelling: Naming scheme of its halves.
        adapters: Adapter names that occur in the names of its halves.
        halves: ``down`` and ``up``, as far as they exist.
        alpha: The layer's own alpha, if it has one.
    """

    name: str
    spelling: Spelling = Spelling.DIFFUSERS
    adapters: set[str] = field(default_factory=set)
    halves: dict[str, torch.Tensor] = field(default_factory=dict)
    alpha: float | None = None


@dataclass
class _Sorted:
    """Tensors of a file, sorted.

    Args:
        layers: Site name to its tensors.
        bundled: As in `LoRAContent`.
        refused: Reason why something cannot be used, to the names of its tensors or layers.
        strange: Sites with tensors of other methods than LoRA.
        unknown: Names of tensors that are not recognised yet.
    """

    layers: dict[str, _Layer] = field(default_factory=dict)
    bundled: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)
    refused: dict[str, list[str]] = field(default_factory=dict)
    strange: set[str] = field(default_factory=set)
    unknown: list[str] = field(default_factory=list)

    def layer(self, name: str) -> _Layer:
        """Find or create the layer of this name; spellings of the same site share it."""
        return self.layers.setdefault(site_of(name), _Layer(name))

    def refuse(self, reason: str, name: str) -> None:
        """Record that something cannot be used."""
        self.refused.setdefault(reason, []).append(name)

    def refuse_kind(self, kind: OtherKind, name: str) -> None:
        """Record a tensor of another method, and its layer as one of that method."""
        self.refuse(kind.told, name)
        self.strange.add(site_of(kind.layer))


def content_of(
    tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str], path: Path | None = None
) -> LoRAContent:
    """Sort the tensors of a LoRA file.

    Args:
        tensors: Name to tensor, as in the file.
        metadata: Metadata of the file.
        path: The file, beside which PEFT's settings may lie.
    """
    products = {site_of(layer) for layer in list_products(tensors)}
    tensors = convert_to_halves(tensors)
    settings = settings_in_header(metadata)
    if settings is None:
        # Only for tensors in PEFT's names: in a folder of downloads the settings may belong to another file.
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
            # The header describes diffusers' layers, not those of the original code.
            silent = stock.KEY in metadata and is_only_original(site)
            lora[site], origins[site] = _make_update(site, layer, PeftSettings() if silent else settings)
    by_settings = {site: update.rank for site, update in lora.items() if origins[site] == settings.place}
    untold = {site: found.layers[site].spelling for site, origin in origins.items() if origin == _NOT_TOLD}
    remarks = _list_assumptions(untold, {lora[site].rank for site in untold}, metadata)
    if unsure := settings.ambiguous(by_settings):
        remarks.append(f"{_SORTED}: {list_names(unsure)}")
    defects = [*settings.defects, *settings.misfits(by_settings)]
    of_diffusers_model = Spelling.ORIGINAL not in untold.values()  # in original names alpha is the rank
    defects += [_NOT_KNOWN] if Spelling.PEFT in untold.values() and of_diffusers_model else []
    defects += [f"{reason}: {list_names(names)}" for reason, names in found.refused.items()]
    lora, misfits = to_diffusers(_mark_convolutions(lora, products))
    defects += [*misfits, *(content_defects((), {}, lora, ()) if lora else [])]
    if not lora and not defects:
        defects.append("none of its tensors belongs to a layer of a text encoder, U-Net or transformer")
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
    """Sort tensors into layers by site and bundled embeddings; record what is not LoRA."""
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
        elif name.endswith(".alpha") and tensor.numel() == 1 and not tensor.is_complex():
            found.layer(name.removesuffix(".alpha")).alpha = float(to_working_dtype(tensor))
        elif embedding is not None and is_showable(name) and _is_vectors(tensor):
            encoder = "clip_g" if embedding["vectors"] == "clip_g" else "clip_l"
            rows = to_working_dtype(tensor).reshape(-1, tensor.shape[-1])
            found.bundled.setdefault(embedding["name"], {})[encoder] = rows
        else:
            found.unknown.append(name)
    return found


def _is_vectors(tensor: torch.Tensor) -> bool:
    return tensor.dim() in (1, 2) and tensor.numel() > 0 and tensor.is_floating_point()


def _settle_unknown(found: _Sorted) -> None:
    """Classify the remaining tensors; alphas and weights of layers of another method are reported with these."""
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
    """Report the unsupported base that a file was made for, recognised by layers that no known family has."""
    unfit = {layer.name: site for site, layer in found.layers.items() if not _is_known(site)}
    transformer = {layer.name: site for site, layer in found.layers.items() if site.startswith("transformer.")}
    if any(re.search(r"\.\d+\.", site) for site in unfit.values()) or _reads_another_text(found, transformer.values()):
        unfit |= transformer  # all blocks belong to the unknown model, also those with names of a known one
    refused = (name for names in found.refused.values() for name in names if not _is_of_known(name))
    base, names = other_base([*unfit, *refused])
    for name in names:
        found.refuse(f"made for {base}, with layers that no supported base has", name)
        found.layers.pop(unfit.get(name, ""), None)


def _reads_another_text(found: _Sorted, sites: Iterable[str]) -> bool:
    """Whether layers have the names of a known transformer with cross-attention but not its text width.

    In diffusers, such transformers share layer names, so only the width tells them apart.
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
    """Refuse several adapters in one component: the file does not say which one to use."""
    adapters: dict[str, set[str]] = {}
    for site, layer in found.layers.items():
        adapters.setdefault(site.partition(".")[0], set()).update(layer.adapters)
    for names in adapters.values():
        for name in sorted(names) if len(names) > 1 else ():
            found.refuse("several adapters in one file; save the one to use on its own", name or "without a name")


def _fault(site: str, layer: _Layer) -> str:
    """Why a layer is not an update of a linear layer or 1 x 1 convolution; empty if it is."""
    if not layer.halves:
        return "alphas without matrices"
    if len(layer.halves) < 2:
        return "only one of the two matrices, down or up"
    down, up = layer.halves["down"], layer.halves["up"]
    flat = all(half.dim() == 2 or half.shape[2:] == (1, 1) for half in (down, up))
    if not flat or not 1 <= down.shape[0] == up.shape[1]:
        return "not a pair of matrices of a linear layer or 1 x 1 convolution"
    if not _is_known(site):
        return "unsupported layers; supported are attention, feed-forward layers and projections"
    return ""


def _is_known(site: str) -> bool:
    """Whether some family has a linear layer of this name, in diffusers or in its original code."""
    return is_linear_site(site) or is_only_original(site)


def _is_of_known(name: str) -> bool:
    """Whether a tensor of any kind belongs to a known layer: its name without the last one or two parts."""
    owner = name.rpartition(".")[0]
    return any(_is_known(site_of(layer)) for layer in (owner, owner.rpartition(".")[0]) if layer)


def _make_update(site: str, layer: _Layer, settings: PeftSettings) -> tuple[LowRank, str]:
    """The update of a valid layer, and where its alpha comes from."""
    down, up = (to_working_dtype(layer.halves[half]) for half in ("down", "up"))
    rank = down.shape[0]
    alpha, origin = layer.alpha, _OWN
    if alpha is None:
        alpha, origin = settings.alpha(site, rank), settings.place
    if alpha is None:
        alpha, origin = float(rank), _NOT_TOLD
    return LowRank.from_file(down, up, alpha), origin


def _mark_convolutions(lora: Mapping[str, LowRank], products: Collection[str]) -> dict[str, LowRank]:
    """Mark the 1 x 1 convolutions among the layers of LoHa and LoKr, whose matrices do not tell.

    Args:
        lora: Site name to update.
        products: Sites whose updates were products of matrices in the file.
    """
    base = recognise(input_widths(lora))
    are_linear = base is not None and base.linear_projections
    names = ("conv_shortcut",) if are_linear else ("conv_shortcut", "proj_in", "proj_out")
    return {
        site: replace(update, convolution=True)
        if site in products and site.startswith("unet.") and site.endswith(names)
        else update
        for site, update in lora.items()
    }


def _list_assumptions(untold: Mapping[str, Spelling], ranks: set[int], metadata: Mapping[str, str]) -> list[str]:
    """Assumptions about alphas that are not in the file and that no program's convention decides.

    Args:
        untold: Site without an alpha to its naming scheme.
        ranks: Ranks of these sites.
        metadata: Metadata of the file.
    """
    remarks = [_ASSUMED] if Spelling.ONE_MODEL in untold.values() else []
    told = metadata.get(_KOHYAS, "")
    if untold and re.fullmatch(r"\d{1,6}(\.\d{1,6})?", told) and float(told) not in ranks:
        remarks.append(f"its header says {_KOHYAS}={told}, {_LOST}")
    return remarks


def _count(origins: Iterable[str]) -> str:
    counts = Counter(origins)
    return ", ".join(origin if len(counts) == 1 else f"{origin} ({count} layers)" for origin, count in counts.items())
