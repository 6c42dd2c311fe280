"""Apply low-rank updates to a borrowed model: merged temporarily, or as PEFT adapters; then restore the model."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Set
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
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
from diffusers_mixofshow.offloading import find_onload_device, follow_changed_layers
from diffusers_mixofshow.sharing import changing


_TRAINING_ADAPTER = "edlora_training"
_LOADED_ADAPTER = "mixofshow_loaded"
# Rounding of a cast to bfloat16, relative to the largest value.
_CAST = 2**-8
# Model to adapters that diffusers removed while they were fused, to their strength by layer.
_fused: WeakKeyDictionary[nn.Module, dict[str, dict[str, float]]] = WeakKeyDictionary()
# Name of the fused projection of an attention layer to the projections whose weights it copies.
_COPIES = {
    "to_qkv": ("to_q", "to_k", "to_v"),
    "to_kv": ("to_k", "to_v"),
    "to_added_qkv": ("add_q_proj", "add_k_proj", "add_v_proj"),
}


@contextmanager
def merged(components: Mapping[str, object], edlora: EDLoRA, scale: float = 1.0) -> Iterator[None]:
    """Add the ED-LoRA's updates to the weights inside the block; afterwards restore every weight, bit for bit.

    Embeddings are not loaded. In layers with PEFT adapters the update is added to the base weight.

    Args:
        components: ``pipeline.components``, or a part of them; updates of missing ones are skipped.
        edlora: The ED-LoRA.
        scale: Factor on every update.

    Raises:
        EDLoRAFormatError: If the ED-LoRA does not fit the model.
        ConfigurationError: If attention uses fused copies of the weights, to which the updates would not be added.
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
    """Add the ED-LoRA's updates as PEFT adapters, active together with those already active.

    diffusers' ``get_list_adapters``, ``set_adapters`` and ``cross_attention_kwargs={"scale": ...}`` work with them.
    They do not require gradients; gradient flags of the base weights and the global random state do not change.

    Args:
        components: ``pipeline.components``, or a part of them; updates of missing ones are skipped.
        edlora: The ED-LoRA.
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
            with torch.random.fork_rng(devices=[]):  # PEFT draws initial values, overwritten below
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
    """Remove an adapter: layers without any other adapter are replaced by their original modules.

    Other adapters are kept. Components without the adapter are skipped, so that it may have been deleted before with
    diffusers' own methods.

    Raises:
        ConfigurationError: If adapters are fused, so that the weights could not be restored, or attention uses copies
            of such weights, or another thread uses the model.
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
    """Names of all adapters in the models, including those removed while fused (see `remember_fused`)."""
    models = components_with_sites(components).values()
    return frozenset(name for model in models for name in (*getattr(model, "peft_config", {}), *_fused.get(model, {})))


def find_adapted(components: Mapping[str, object], edlora: EDLoRA) -> dict[str, nn.Module]:
    """The components that the ED-LoRA has updates for."""
    models = components_with_sites(components)
    return {component: models[component] for component in _first_sites(edlora) if component in models}


def find_holders(components: Mapping[str, object], edlora: EDLoRA, adapter_name: str) -> frozenset[str]:
    """The components that have the ED-LoRA's updates, as this adapter or permanently fused (see `remember_fused`).

    Determined from the models, as diffusers' methods and other pipelines change them, too. An adapter of the same name
    with other weights does not count.
    """
    sites = _first_sites(edlora)
    return frozenset(
        component
        for component, model in find_adapted(components, edlora).items()
        if adapter_name in _fused.get(model, {})
        or _is_filled_with(_find_module(model, sites[component]), adapter_name, edlora.lora[sites[component]])
    )


def find_inactive(components: Mapping[str, object], edlora: EDLoRA, adapter_name: str) -> dict[str, str]:
    """Component to the reason why the ED-LoRA's updates have no effect in it; others are left out."""
    held, sites = find_holders(components, edlora, adapter_name), _first_sites(edlora)
    reasons = {
        component: _explain_inactive(model, sites[component], adapter_name, component in held)
        for component, model in find_adapted(components, edlora).items()
    }
    return {component: reason for component, reason in reasons.items() if reason is not None}


def remember_fused(components: Mapping[str, object], names: Set[str]) -> None:
    """Remember which of these adapters are fused, and their strength, before diffusers removes them.

    Their updates then stay in the weights; `subtract_fused` removes them.
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
    """Whether the adapter's updates stayed in the weights when diffusers removed it, see `remember_fused`."""
    return any(adapter_name in _fused.get(model, {}) for model in components_with_sites(components).values())


def subtract_fused(components: Mapping[str, object], edlora: EDLoRA, adapter_name: str) -> None:
    """Subtract updates that stayed in the weights, which restores these up to rounding.

    Raises:
        ConfigurationError: If attention uses copies of the weights, or another thread uses the model.
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
    """Keep those of these adapters active that are active now, together with any activated inside the block."""
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
    """New LoRA layers inside a model, to be trained.

    Args:
        layers: Site name to PEFT's layer.
        adapter_name: PEFT's name for the adapter.
        alpha: PEFT's ``lora_alpha``, the same for all layers.
    """

    layers: Mapping[str, LoraLayer]
    adapter_name: str
    alpha: float

    def read(self) -> dict[str, LowRank]:
        """Copy the current values to the CPU: site name to update."""
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
    """Add a LoRA in float32 to every adapted layer inside the block: `down` random, `up` zero, so without effect yet.

    Inside the block only these matrices require gradients; afterwards modules and flags are restored.

    Args:
        components: ``pipeline.components``, or a part of them.
        rank: Rank of every update.
        alpha: Updates are scaled by alpha / rank.
        wanted: Selects adapted layers by site name; all by default.
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
    """Inject PEFT layers of the given (rank, alpha) and return them by site; gradient flags are kept."""
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
        warnings.filterwarnings("ignore", message="TorchaoLoraLinear was instantiated without")  # only to merge
        try:
            inject_adapter_in_model(config, model, adapter_name)
        except (ValueError, TypeError, NotImplementedError, ImportError) as error:
            raise ConfigurationError(
                f"PEFT cannot add LoRA to the layers of this {type(model).__name__}: {first_line(error)}. "
                "Expected linear layers in float, or quantised by torchao to 8 bits, by bitsandbytes, GGUF or Quanto. "
                "Load the base model in one of these ways, or without quantisation."
            ) from error
    vars(model)["_hf_peft_config_loaded"] = True  # checked by the adapter methods of diffusers and transformers
    for layer in model.modules():
        if isinstance(layer, BaseTunerLayer):
            layer.set_adapter([*active, adapter_name])
            layer.train(layer.get_base_layer().training)


def _fill(linear: nn.Linear, matrix: torch.Tensor, base: nn.Module, model: nn.Module) -> None:
    """Set the values of one half of an adapter, on the device where the base layer computes.

    The dtype is that of the base's weights, or of `matrix` if these are stored in 8 or 4 bits.
    """
    weight: torch.Tensor = base.weight  # type: ignore[assignment]
    place, dtype = find_onload_device(base, model) or weight.device, weight.dtype if _is_wide(weight) else matrix.dtype
    values = matrix.detach().reshape(linear.weight.shape).to(place, dtype)
    linear.weight = nn.Parameter(values.clone(), requires_grad=False)


def _delete_from_layer(layer: LoraLayer, adapter_name: str) -> None:
    """Delete one adapter of a layer, and keep the set of active ones, to which PEFT might add another."""
    active = [name for name in layer.active_adapters if name != adapter_name]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=f"Adapter {re.escape(adapter_name)} was active")
        layer.delete_adapter(adapter_name)
    layer.set_adapter(active)


def _replace_module(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


def _forget(model: nn.Module, adapter_name: str) -> None:
    """Remove an adapter from the model's `peft_config`, and that attribute with the last adapter."""
    configs = getattr(model, "peft_config", {})
    configs.pop(adapter_name, None)
    if "peft_config" in vars(model) and not configs:
        del model.peft_config
        vars(model).pop("_hf_peft_config_loaded", None)


def _active_adapters(model: nn.Module) -> list[str]:
    return next((list(layer.active_adapters) for layer in model.modules() if isinstance(layer, BaseTunerLayer)), [])


def _base_weight(layer: nn.Module, name: str) -> nn.Parameter:
    """Weight of a layer inside any PEFT wrapper; refuses weights to which no update can be added."""
    layer = _unwrap(layer)
    weight = getattr(layer, "weight", None)
    if isinstance(weight, nn.Parameter) and weight.is_meta:
        raise ConfigurationError(
            f"The weights of {name} are not in memory (sequential or disk offload), so no update can be added to "
            "them. Call pipe.remove_all_hooks() first, or use enable_model_cpu_offload()."
        )
    if not isinstance(weight, nn.Parameter) or not _is_plain(weight):
        kind = f"{type(layer).__name__}, {getattr(weight, 'dtype', 'no weight')}"
        raise ConfigurationError(
            f"The weights of {name} are quantised ({kind}), so no update can be added to them. Load the base "
            "model in half precision, or use adapters, as load_edlora() does, which work with quantised weights."
        )
    return weight


def _is_plain(weight: torch.Tensor) -> bool:
    """Whether a weight is a plain tensor, not quantised, in a dtype for computation."""
    return type(weight.data) is torch.Tensor and _is_wide(weight)


def _is_wide(weight: torch.Tensor) -> bool:
    """Whether a weight's dtype is for computation, and not one of 8 or 4 bits for storage."""
    return weight.is_floating_point() and weight.dtype.itemsize > 1


def _refuse_absent_weights(model: nn.Module, paths: Iterable[str]) -> None:
    """Refuse layers whose weights are not in memory and that offloading does not load when needed."""
    for path in paths:
        layer = _unwrap(model.get_submodule(path))
        weight = getattr(layer, "weight", None)
        if isinstance(weight, torch.Tensor) and weight.is_meta and find_onload_device(layer, model) is None:
            raise ConfigurationError(
                f"The weights of {path} are not in memory: they are on the meta device, and nothing brings them. Load "
                "the base model with its weights."
            )


def _unwrap(layer: nn.Module) -> nn.Module:
    """The layer inside any PEFT wrapper."""
    inner: nn.Module = layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer
    return inner


def _first_sites(edlora: EDLoRA) -> dict[str, str]:
    """The first site of each component of the ED-LoRA, as diffusers' methods treat all layers of one alike."""
    return {site.partition(".")[0]: site for site in reversed(list(edlora.lora))}


def _find_module(model: nn.Module, site: str) -> nn.Module | None:
    """The module of a site, with its PEFT wrapper, if any; None if there is none."""
    path = site.partition(".")[2]
    for spelling in (path, path.removeprefix("text_model.")):
        try:
            return model.get_submodule(spelling)
        except AttributeError:
            continue
    return None


def _is_filled_with(layer: object, adapter_name: str, update: LowRank) -> bool:
    """Whether the layer has an adapter of this name with this update, in any dtype."""
    if not isinstance(layer, LoraLayer) or adapter_name not in layer.lora_A:
        return False
    for matrices, expected in ((layer.lora_A, update.down), (layer.lora_B, update.up)):
        present = matrices[adapter_name].weight
        if present.numel() != expected.numel():
            return False
        if not present.is_meta:  # offloaded: nothing to compare
            wanted = expected.reshape(present.shape).to(present.device, torch.float32)
            kind = torch.finfo(present.dtype)
            tolerance = _CAST * wanted.abs().max().item() + kind.tiny * kind.eps  # the smallest number above 0
            if not torch.allclose(present.float(), wanted, rtol=0, atol=tolerance):
                return False
    return True


def _explain_inactive(model: nn.Module, site: str, adapter_name: str, held: bool) -> str | None:
    layer = _find_module(model, site)
    if not held:
        return "has been removed; call load_edlora() again"
    passed_over = "is bypassed by fuse_qkv_projections(); call pipe.unet.unfuse_qkv_projections()"
    if not isinstance(layer, LoraLayer) or adapter_name not in layer.lora_A:  # permanently fused
        return passed_over if _reads_old_copies(model) else None
    if _copying_attention(model):
        return passed_over
    if layer.merged:
        if adapter_name in layer.merged_adapters:
            return None
        return "is bypassed while other adapters are fused; call pipe.unfuse_lora()"
    if layer.disable_adapters:
        return "is switched off; call pipe.enable_lora()"
    if adapter_name not in layer.active_adapters:
        active = ", ".join(map(repr, layer.active_adapters)) or "none"
        return f"is not among the active adapters ({active}); name it in pipe.set_adapters()"
    return None


def _copying_attention(model: nn.Module) -> list[nn.Module]:
    """The attention layers that use fused copies of their projections' weights."""
    return [module for module in model.modules() if _reads_copies(module)]


def _reads_copies(attention: nn.Module) -> bool:
    if isinstance(attention, AttentionModuleMixin):
        return bool(attention.fused_projections)
    processor = getattr(attention, "processor", None)  # `Attention.fused_projections` stays True after unfusing
    return isinstance(getattr(processor, "inner", processor), FusedAttnProcessor2_0 | FusedJointAttnProcessor2_0)


def _reads_old_copies(model: nn.Module) -> bool:
    """Whether weights have changed since attention copied them, by fusing adapters or unfusing them."""
    return any(
        not torch.equal(copy.weight, torch.cat([_base_weight(getattr(attention, name), name) for name in names]))
        for attention in _copying_attention(model)
        for called, names in _COPIES.items()
        if (copy := getattr(attention, called, None)) is not None
    )


def refuse_copied(components: Mapping[str, object]) -> None:
    """Refuse while attention uses fused copies of weights, which miss changes of these and bypass the layers.

    Raises:
        ConfigurationError: If it does; says what to call first.
    """
    for component, model in components_with_sites(components).items():
        if _copying_attention(model):
            raise _copies_error(component)


def _copies_error(component: str) -> ConfigurationError:
    return ConfigurationError(
        "Attention uses copies of the weights, made by fuse_qkv_projections(): updates added to the weights or "
        "removed from them would not reach the copies, and the layers themselves are bypassed, so that nothing can be "
        f"recorded. Call pipe.{component}.unfuse_qkv_projections() first, and "
        f"pipe.{component}.fuse_qkv_projections() afterwards."
    )


def check_name(taken: Set[str], adapter_name: str) -> None:
    """Refuse an adapter's name that is malformed or already in use.

    Raises:
        ConfigurationError: If it is malformed or among `taken`.
    """
    if not re.fullmatch(r"[\w-]+", adapter_name):
        raise ConfigurationError(
            f"Adapter name {adapter_name!r} cannot be used; PEFT accepts only letters, digits, '_' and '-'."
        )
    if adapter_name in taken:
        raise ConfigurationError(
            f"An adapter named {adapter_name!r} is loaded already (loaded: {', '.join(sorted(taken))}). "
            "Unload it first, or give this one another adapter_name."
        )


def refuse_fused(components: Mapping[str, object], names: Set[str] | None = None) -> None:
    """Refuse while adapters, or only those of these names, are fused into the weights.

    PEFT ignores a new adapter on a fused layer, deletes a fused one without subtracting it from the weight, and
    unfuses with its current strength instead of the strength it was fused with.

    Raises:
        ConfigurationError: If any is fused; says what to call first.
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
    """Restore `requires_grad` of every current parameter at the end of the block."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def loads_concepts(pipe: Any) -> bool:
    """Whether a pipeline loads ED-LoRAs; diffusers' own pipelines load only plain LoRAs."""
    return all(hasattr(pipe, method) for method in ("load_edlora", "unload_edlora", "set_concepts_aside"))


@contextmanager
def loaded(pipe: Any, edlora: EDLoRA | None, scale: float = 1.0, name: str = _LOADED_ADAPTER) -> Iterator[None]:
    """Load an ED-LoRA or a plain LoRA, or nothing, into a pipeline inside the block.

    Args:
        pipe: A pipeline of this package, or one of diffusers' own for plain LoRAs.
        edlora: What is loaded.
        scale: Strength of the weight updates.
        name: The adapter's name.

    Raises:
        ConfigurationError: If it has concepts, and the pipeline loads plain LoRAs alone.
    """
    if edlora is not None and edlora.concepts and not loads_concepts(pipe):
        raise ConfigurationError(f"A {type(pipe).__name__} cannot load concepts; expected a pipeline of this package.")
    with ExitStack() as undo:
        if edlora is not None and loads_concepts(pipe):
            pipe.load_edlora(edlora, scale, name)
            undo.callback(pipe.unload_edlora, name)
        elif edlora is not None:
            inject(pipe.components, edlora, name, scale)
            undo.callback(eject, pipe.components, name)
        yield
