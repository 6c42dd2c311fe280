"""Low-rank updates on a model that is not ours: merged for a while, or beside its layers as PEFT adapters."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Set
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_processor import FusedAttnProcessor2_0, FusedJointAttnProcessor2_0
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from diffusers_mixofshow.edlora import EDLoRA, LowRank
from diffusers_mixofshow.edlora.low_rank import low_rank_delta
from diffusers_mixofshow.errors import ConfigurationError, first_line
from diffusers_mixofshow.families.layers import adapted_layers, canonical_name, components_with_sites, linear_layers
from diffusers_mixofshow.offloading import brought_to, follow_changed_layers
from diffusers_mixofshow.sharing import changing


_TRAINING_ADAPTER = "edlora_training"
# How far a number may be moved by a cast to bfloat16, as a part of the largest one.
_CAST = 2**-8
# Adapters that diffusers removed while they were fused, with their strength in each layer.
_fused: WeakKeyDictionary[nn.Module, dict[str, dict[str, float]]] = WeakKeyDictionary()
# Layers that attention may read as one, to what it calls the copy of their weights.
_COPIES = {
    "to_qkv": ("to_q", "to_k", "to_v"),
    "to_kv": ("to_k", "to_v"),
    "to_added_qkv": ("add_q_proj", "add_k_proj", "add_v_proj"),
}


@contextmanager
def merged(components: Mapping[str, object], edlora: EDLoRA, scale: float = 1.0) -> Iterator[None]:
    """Add the ED-LoRA's updates to the weights inside the block; afterwards every weight is what it was, bit for bit.

    The embeddings are not touched. Layers that carry PEFT adapters keep them; the update goes to the base weight.

    Args:
        components: ``pipeline.components``, or a part of them; updates of what is not given are left out.
        edlora: Whose updates to add.
        scale: Factor on every update.

    Raises:
        EDLoRAFormatError: If the ED-LoRA does not fit the model.
        ConfigurationError: If attention reads copies of the weights, which would not have the updates.
    """
    edlora.check_fits(components)
    refuse_copied(components)
    layers = linear_layers(components)
    originals: list[tuple[nn.Parameter, torch.Tensor]] = []
    with changing(*components_with_sites(components).values()):
        try:
            for site in edlora.lora.keys() & layers.keys():
                weight = _base_weight(layers[site], site)
                delta = scale * low_rank_delta(edlora.lora[site], like=weight).reshape(weight.shape)
                originals.append((weight, weight.data))
                weight.data = (weight.data.to(delta.dtype) + delta).to(weight.dtype)
            yield
        finally:
            for weight, original in reversed(originals):
                weight.data = original.to(weight.device)


def inject(components: Mapping[str, object], edlora: EDLoRA, adapter_name: str, scale: float = 1.0) -> None:
    """Put the ED-LoRA's updates beside the layers as PEFT adapters, active together with those already active.

    diffusers' own ``get_list_adapters``, ``set_adapters`` and ``cross_attention_kwargs={"scale": ...}`` see them.
    They do not require gradients; gradient flags of the base weights and the global random state do not change.

    Args:
        components: ``pipeline.components``, or a part of them; updates of what is not given are left out.
        edlora: Whose updates to inject.
        adapter_name: PEFT's name for them; letters, digits, ``_`` and ``-``.
        scale: Factor on every update.

    Raises:
        EDLoRAFormatError: If the ED-LoRA does not fit the model; the model is unchanged.
        ConfigurationError: If the name is taken or malformed, adapters are fused, or another thread uses the model;
            the model is unchanged.
    """
    refuse_fused(components)
    edlora.check_fits(components)
    shapes = {site: (update.rank, update.alpha) for site, update in edlora.lora.items()}
    check_name(adapter_names(components), adapter_name)
    models = components_with_sites(components)
    with changing(*models.values()):
        try:
            with torch.random.fork_rng(devices=[]):  # PEFT draws initial values, which are overwritten here
                layers = _add_adapter(components, adapter_name, shapes)
            for site, layer in layers.items():
                update = edlora.lora[site]
                for linear, matrix in ((layer.lora_A, update.down), (layer.lora_B, update.up)):
                    _fill(linear[adapter_name], matrix, layer.get_base_layer(), models[site.partition(".")[0]])
                layer.set_scale(adapter_name, scale)
            for model in models.values():
                follow_changed_layers(model)
        except BaseException:
            eject(components, adapter_name)
            raise


def eject(components: Mapping[str, object], adapter_name: str) -> None:
    """Take an adapter out again: layers without any other adapter become the very modules they were.

    Other adapters stay as they are. Components that do not have the adapter are left alone, so that it does no harm
    if the user has deleted it with diffusers' own methods before.

    Raises:
        ConfigurationError: If adapters are fused, so that the weights could not be given back as they were, or
            copies of such weights are in use, or another thread uses the model.
    """
    refuse_fused(components)
    for component, model in components_with_sites(components).items():
        if _reads_old_copies(model):
            raise _copies_error(component)
    for model in components_with_sites(components).values():
        with changing(model), keep_gradient_flags(model):
            for path, layer in list(model.named_modules()):
                if isinstance(layer, LoraLayer):
                    _delete_from_layer(layer, adapter_name)
                    if not layer.lora_A and not layer.lora_embedding_A:
                        _replace_module(model, path, layer.get_base_layer())
            follow_changed_layers(model)
        _forget(model, adapter_name)


def adapter_names(components: Mapping[str, object]) -> frozenset[str]:
    """Names of all adapters in the models, also other programs', and of those fused for good (see `note_fused`)."""
    models = components_with_sites(components).values()
    return frozenset(name for model in models for name in (*getattr(model, "peft_config", {}), *_fused.get(model, {})))


def adapted_components(components: Mapping[str, object], edlora: EDLoRA) -> dict[str, nn.Module]:
    """Those of the components that the ED-LoRA has updates for."""
    models = components_with_sites(components)
    return {component: models[component] for component in _first_sites(edlora) if component in models}


def holders(components: Mapping[str, object], edlora: EDLoRA, adapter_name: str) -> frozenset[str]:
    """The components that have the ED-LoRA's updates: as this adapter, or fused for good (see `note_fused`).

    Read off the models, which diffusers' own methods and other pipelines change, too. An adapter of the same name with
    other weights is another one.
    """
    sites = _first_sites(edlora)
    return frozenset(
        component
        for component, model in adapted_components(components, edlora).items()
        if adapter_name in _fused.get(model, {})
        or _is_filled_with(_layer_at(model, sites[component]), adapter_name, edlora.lora[sites[component]])
    )


def out_of_action(components: Mapping[str, object], edlora: EDLoRA, adapter_name: str) -> dict[str, str]:
    """Why the ED-LoRA's updates do not act: component to the reason; those in which they act are left out."""
    held, sites = holders(components, edlora, adapter_name), _first_sites(edlora)
    reasons = {
        component: _why_silent(model, sites[component], adapter_name, component in held)
        for component, model in adapted_components(components, edlora).items()
    }
    return {component: reason for component, reason in reasons.items() if reason is not None}


def note_fused(components: Mapping[str, object], names: Set[str]) -> None:
    """Remember which of these adapters are fused, and how strongly, as diffusers forgets it when it removes them.

    Their updates stay in the weights then. `eject` takes them out again.
    """
    for model in components_with_sites(components).values():
        strengths: dict[str, dict[str, float]] = {}
        for path, layer in model.named_modules():
            if isinstance(layer, LoraLayer):
                for name in names & set(layer.merged_adapters) & layer.scaling.keys():
                    strengths.setdefault(name, {})[path] = layer.scaling[name]
        if strengths:
            _fused[model] = {**_fused.get(model, {}), **strengths}


def is_fused(components: Mapping[str, object], adapter_name: str) -> bool:
    """Whether the adapter's updates stayed in the weights when diffusers removed it."""
    return any(adapter_name in _fused.get(model, {}) for model in components_with_sites(components).values())


def take_out_fused(components: Mapping[str, object], edlora: EDLoRA, adapter_name: str) -> None:
    """Subtract updates that stayed in the weights; these are then what they were up to rounding.

    Raises:
        ConfigurationError: If copies of the weights are in use, or another thread uses the model.
    """
    if is_fused(components, adapter_name):
        refuse_copied(components)
    for component, model in components_with_sites(components).items():
        with changing(model):
            strengths = _fused.get(model, {}).get(adapter_name, {})
            for path, strength in strengths.items():
                site = canonical_name(component, path)
                weight = _base_weight(model.get_submodule(path), path)
                delta = strength * low_rank_delta(edlora.lora[site], like=weight).reshape(weight.shape)
                weight.data = (weight.data.to(delta.dtype) - delta).to(weight.dtype)
            _fused.get(model, {}).pop(adapter_name, None)


@contextmanager
def keep_active(components: Mapping[str, object], names: Collection[str]) -> Iterator[None]:
    """Whatever becomes active inside the block, those of these adapters that were active before stay so beside it."""
    models = components_with_sites(components).values()
    before = {model: [name for name in _active_adapters(model) if name in names] for model in models}
    try:
        yield
    finally:
        for model, ours in before.items():
            with keep_gradient_flags(model):
                for layer in model.modules():
                    if ours and isinstance(layer, BaseTunerLayer):
                        layer.set_adapter(list(dict.fromkeys([*ours, *layer.active_adapters])))


@dataclass(frozen=True)
class TrainableLoRA:
    """Fresh LoRA layers inside a model, to be trained.

    Args:
        layers: Site name to PEFT's layer.
        adapter_name: PEFT's name for the adapter.
        alpha: PEFT's ``lora_alpha``, the same for all layers.
    """

    layers: Mapping[str, LoraLayer]
    adapter_name: str
    alpha: float

    def read(self) -> dict[str, LowRank]:
        """Copy the present values to the CPU: site name to update."""
        return {
            site: LowRank(
                down=layer.lora_A[self.adapter_name].weight.detach().cpu().clone(),
                up=layer.lora_B[self.adapter_name].weight.detach().cpu().clone(),
                alpha=self.alpha,
            )
            for site, layer in self.layers.items()
        }


@contextmanager
def trainable(
    components: Mapping[str, object], rank: int, alpha: float, wanted: Callable[[str], bool] = lambda site: True
) -> Iterator[TrainableLoRA]:
    """Give every adapted layer a fresh LoRA in float32 inside the block: `down` random, `up` zero, so no effect yet.

    Inside the block only these matrices require gradients; afterwards modules and flags are what they were.

    Args:
        components: ``pipeline.components``, or a part of them.
        rank: Rank of every update.
        alpha: Updates are scaled by alpha / rank.
        wanted: Which of the adapted layers get one, by site name; all of them by default.
    """
    if rank < 1:
        raise ConfigurationError(f"The rank of a LoRA must be at least 1, got {rank}.")
    refuse_fused(components)
    check_name(adapter_names(components), _TRAINING_ADAPTER)
    shapes = dict.fromkeys(filter(wanted, adapted_layers(components)), (rank, alpha))
    with ExitStack() as stack:
        stack.enter_context(changing(*components_with_sites(components).values()))
        for model in components_with_sites(components).values():
            stack.enter_context(keep_gradient_flags(model))
            model.requires_grad_(False)
        stack.callback(eject, components, _TRAINING_ADAPTER)
        layers = _add_adapter(components, _TRAINING_ADAPTER, shapes)
        for layer in layers.values():
            for matrices in (layer.lora_A, layer.lora_B):
                matrices[_TRAINING_ADAPTER].to(torch.float32).requires_grad_(True)
        yield TrainableLoRA(layers=layers, adapter_name=_TRAINING_ADAPTER, alpha=alpha)


def _add_adapter(
    components: Mapping[str, object], adapter_name: str, shapes: Mapping[str, tuple[int, float]]
) -> dict[str, LoraLayer]:
    """Inject PEFT layers of the given (rank, alpha) and return them by site; the base's gradient flags stay."""
    for component, model in components_with_sites(components).items():
        paths = {canonical_name(component, path): path for path, _ in model.named_modules()}
        wanted = {paths[site]: shape for site, shape in shapes.items() if site.partition(".")[0] == component}
        _refuse_absent_weights(model, wanted)
        if wanted:
            with keep_gradient_flags(model):
                _inject_into(model, adapter_name, wanted)
    layers = linear_layers(components)
    return {site: layers[site] for site in shapes if site in layers}


def _inject_into(model: nn.Module, adapter_name: str, shapes: Mapping[str, tuple[int, float]]) -> None:
    """Inject into one model at exactly the given module paths, each with its own (rank, alpha)."""
    usual_rank, usual_alpha = Counter(shapes.values()).most_common(1)[0][0]
    config = LoraConfig(
        r=usual_rank,
        lora_alpha=usual_alpha,
        target_modules="|".join(re.escape(path) for path in shapes),  # a string is matched as a whole
        rank_pattern={f"^{re.escape(path)}": rank for path, (rank, _) in shapes.items() if rank != usual_rank},
        alpha_pattern={f"^{re.escape(path)}": alpha for path, (_, alpha) in shapes.items() if alpha != usual_alpha},
    )
    active = _active_adapters(model)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
        warnings.filterwarnings("ignore", message="TorchaoLoraLinear was instantiated without")  # to merge it, alone
        try:
            inject_adapter_in_model(config, model, adapter_name)
        except (ValueError, TypeError, NotImplementedError, ImportError) as error:
            raise ConfigurationError(
                f"PEFT cannot put LoRA beside the layers of this {type(model).__name__}: {first_line(error)}. "
                "Expected linear layers in float, or quantised by torchao to 8 bits, by bitsandbytes, GGUF or Quanto. "
                "Load the base model so, or without quantisation."
            ) from error
    vars(model)["_hf_peft_config_loaded"] = True  # what the adapter methods of diffusers and transformers ask for
    for layer in model.modules():
        if isinstance(layer, BaseTunerLayer):
            layer.set_adapter([*active, adapter_name])
            layer.train(layer.get_base_layer().training)


def _fill(linear: nn.Linear, matrix: torch.Tensor, base: nn.Module, model: nn.Module) -> None:
    """Give one half of an adapter its values, where the base layer computes.

    Its dtype is that of the base's weights, unless they are stored in 8 or 4 bits, with which nobody computes.
    """
    weight: torch.Tensor = base.weight  # type: ignore[assignment]
    place, dtype = brought_to(base, model) or weight.device, weight.dtype if _is_wide(weight) else matrix.dtype
    values = matrix.detach().reshape(linear.weight.shape).to(place, dtype)
    linear.weight = nn.Parameter(values.clone(), requires_grad=False)


def _delete_from_layer(layer: LoraLayer, adapter_name: str) -> None:
    """Delete one adapter of a layer; of the others, those stay active that are (PEFT would wake a sleeping one)."""
    active = [name for name in layer.active_adapters if name != adapter_name]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=f"Adapter {re.escape(adapter_name)} was active")
        layer.delete_adapter(adapter_name)
    layer.set_adapter(active)


def _replace_module(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


def _forget(model: nn.Module, adapter_name: str) -> None:
    """Strike an adapter off the model's list, and the list with the last one."""
    configs = getattr(model, "peft_config", {})
    configs.pop(adapter_name, None)
    if "peft_config" in vars(model) and not configs:
        del model.peft_config
        vars(model).pop("_hf_peft_config_loaded", None)


def _active_adapters(model: nn.Module) -> list[str]:
    return next((list(layer.active_adapters) for layer in model.modules() if isinstance(layer, BaseTunerLayer)), [])


def _base_weight(layer: nn.Module, name: str) -> nn.Parameter:
    """The layer's own weight, under whatever PEFT has put around it, which an update can be added to."""
    layer = _inside(layer)
    weight = getattr(layer, "weight", None)
    if isinstance(weight, nn.Parameter) and weight.is_meta:
        raise ConfigurationError(
            f"The weights of {name} are not in memory (sequential or disk offload), so that no update can be added to "
            "them. Call pipe.remove_all_hooks() first, or use enable_model_cpu_offload()."
        )
    if not isinstance(weight, nn.Parameter) or not _is_plain(weight):
        kind = f"{type(layer).__name__}, {getattr(weight, 'dtype', 'no weight')}"
        raise ConfigurationError(
            f"The weights of {name} are quantised ({kind}), so that no update can be added to them. Load the base "
            "model in half precision; beside quantised weights, updates act as adapters, as load_edlora() makes them."
        )
    return weight


def _is_plain(weight: torch.Tensor) -> bool:
    """Whether a weight is the numbers that are computed with, in a dtype that one computes in."""
    return type(weight.data) is torch.Tensor and _is_wide(weight)


def _is_wide(weight: torch.Tensor) -> bool:
    """Whether a weight's dtype is one that is computed in, and not one of 8 or 4 bits, which only store."""
    return weight.is_floating_point() and weight.dtype.itemsize > 1


def _refuse_absent_weights(model: nn.Module, paths: Iterable[str]) -> None:
    """Refuse layers whose weights are nowhere; those that offloading brings for their turn are right."""
    for path in paths:
        layer = _inside(model.get_submodule(path))
        weight = getattr(layer, "weight", None)
        if isinstance(weight, torch.Tensor) and weight.is_meta and brought_to(layer, model) is None:
            raise ConfigurationError(
                f"The weights of {path} are not in memory: they are on the meta device, and nothing brings them. Load "
                "the base model with its weights."
            )


def _inside(layer: nn.Module) -> nn.Module:
    """The layer itself, under whatever PEFT has put around it."""
    inner: nn.Module = layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer
    return inner


def _first_sites(edlora: EDLoRA) -> dict[str, str]:
    """One site for each component that the ED-LoRA adapts; diffusers' methods treat all of a component alike."""
    return {site.partition(".")[0]: site for site in reversed(list(edlora.lora))}


def _layer_at(model: nn.Module, site: str) -> nn.Module | None:
    """The layer of a site, under whatever PEFT has put around it."""
    path = site.partition(".")[2]
    for spelling in (path, path.removeprefix("text_model.")):
        try:
            return model.get_submodule(spelling)
        except AttributeError:
            continue
    return None


def _is_filled_with(layer: object, adapter_name: str, update: LowRank) -> bool:
    """Whether the layer has an adapter of this name with this update, in whatever dtype."""
    if not isinstance(layer, LoraLayer) or adapter_name not in layer.lora_A:
        return False
    for matrices, expected in ((layer.lora_A, update.down), (layer.lora_B, update.up)):
        present = matrices[adapter_name].weight
        if present.numel() != expected.numel():
            return False
        if not present.is_meta:  # offloaded: nothing to compare
            wanted = expected.reshape(present.shape).to(present.device, torch.float32)
            tolerance = _CAST * wanted.abs().max().item()
            if not torch.allclose(present.float(), wanted, rtol=0, atol=tolerance):
                return False
    return True


def _why_silent(model: nn.Module, site: str, adapter_name: str, held: bool) -> str | None:
    layer = _layer_at(model, site)
    if not held:
        return "has been taken out; call load_edlora() again"
    passed_over = "is passed over by fuse_qkv_projections(); call pipe.unet.unfuse_qkv_projections()"
    if not isinstance(layer, LoraLayer) or adapter_name not in layer.lora_A:  # fused for good
        return passed_over if _reads_old_copies(model) else None
    if _copying_attention(model):
        return passed_over
    if layer.merged:
        if adapter_name in layer.merged_adapters:
            return None
        return "is passed over while other adapters are fused; call pipe.unfuse_lora()"
    if layer.disable_adapters:
        return "is switched off; call pipe.enable_lora()"
    if adapter_name not in layer.active_adapters:
        active = ", ".join(map(repr, layer.active_adapters)) or "none"
        return f"is not among the active adapters ({active}); name it in pipe.set_adapters()"
    return None


def _copying_attention(model: nn.Module) -> list[nn.Module]:
    """The attention layers that read copies of the weights."""
    return [module for module in model.modules() if _reads_copies(module)]


def _reads_copies(attention: nn.Module) -> bool:
    if isinstance(attention, AttentionModuleMixin):
        return bool(attention.fused_projections)
    processor = getattr(attention, "processor", None)  # the mark of an `Attention` stays when that is over
    return isinstance(getattr(processor, "inner", processor), FusedAttnProcessor2_0 | FusedJointAttnProcessor2_0)


def _reads_old_copies(model: nn.Module) -> bool:
    """Whether adapters were fused into weights, or taken out of them, since attention reads copies of these."""
    return any(
        not torch.equal(copy.weight, torch.cat([_base_weight(getattr(attention, name), name) for name in names]))
        for attention in _copying_attention(model)
        for called, names in _COPIES.items()
        if (copy := getattr(attention, called, None)) is not None
    )


def refuse_copied(components: Mapping[str, object]) -> None:
    """Refuse while attention reads copies of the weights: they stay when these change, and no layer sees its input.

    Raises:
        ConfigurationError: Says what to call first.
    """
    for component, model in components_with_sites(components).items():
        if _copying_attention(model):
            raise _copies_error(component)


def _copies_error(component: str) -> ConfigurationError:
    return ConfigurationError(
        "Attention reads copies of the weights, which fuse_qkv_projections() made: they stay as they are when updates "
        "are put into the weights or taken out, and the layers themselves are passed over, so that they record "
        f"nothing. Call pipe.{component}.unfuse_qkv_projections() first, and "
        f"pipe.{component}.fuse_qkv_projections() afterwards."
    )


def check_name(taken: Set[str], adapter_name: str) -> None:
    """Refuse an adapter's name that PEFT cannot take, or that is taken.

    Raises:
        ConfigurationError: If it is malformed or among `taken`.
    """
    if not re.fullmatch(r"[\w-]+", adapter_name):
        raise ConfigurationError(
            f"Adapter name {adapter_name!r} cannot be used; PEFT takes letters, digits, '_' and '-' only."
        )
    if adapter_name in taken:
        raise ConfigurationError(
            f"An adapter named {adapter_name!r} is loaded already (loaded: {', '.join(sorted(taken))}). "
            "Unload it first, or give this one another adapter_name."
        )


def refuse_fused(components: Mapping[str, object], names: Set[str] | None = None) -> None:
    """Refuse while adapters, or those of these names, are fused into the weights.

    PEFT ignores a new adapter on a fused layer, deletes a fused one without taking it out of the weight, and
    subtracts it as strong as it is said to be by then, not as strong as it was added.

    Raises:
        ConfigurationError: Says what to call first.
    """
    for model in components_with_sites(components).values():
        for layer in model.modules():
            if isinstance(layer, BaseTunerLayer) and (
                layer.merged if names is None else names & set(layer.merged_adapters)
            ):
                raise ConfigurationError(
                    "LoRA adapters are fused into the model's weights. Call pipe.unfuse_lora() before an ED-LoRA is "
                    "loaded, trained, given another strength or unloaded, and pipe.fuse_lora() afterwards."
                )


@contextmanager
def keep_gradient_flags(model: nn.Module) -> Iterator[None]:
    """Give every parameter that is there now its present `requires_grad` back at the end."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
