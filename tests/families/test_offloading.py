"""Models as people run them: offloaded, cast layer by layer, quantised; recorded as any, given back as they came.

What a GPU would hold lies on the CPU here, which diffusers and accelerate take as the device to compute on.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from diffusers.hooks import apply_group_offloading, apply_layerwise_casting, group_offloading
from torch import nn

from diffusers_mixofshow import GradientFuser, LoRASource
from diffusers_mixofshow.edlora import EDLoRA, LowRank
from diffusers_mixofshow.errors import ConfigurationError
from diffusers_mixofshow.families import family_of
from diffusers_mixofshow.families.layers import components_with_sites, linear_layers
from diffusers_mixofshow.interop.lora_files import write_lora
from diffusers_mixofshow.lora import eject, inject, merged
from diffusers_mixofshow.offloading import find_onload_device
from families.pipelines import tiny_pipeline


CPU, META = torch.device("cpu"), torch.device("meta")
FAMILIES = ["Stable Diffusion", "Stable Diffusion XL", "FLUX.1"]
SMALL: dict[str, Any] = {"steps": 1, "height": 32, "width": 32, "ridge": 3e-2, "statistics_bytes": None}
PROMPTS = ["photo of sks dog", "sks dog on a beach"]
# Sums of products of the same numbers in another order.
ROUNDING = 1e-5


def _sequentially(pipe: Any) -> None:
    """What `enable_sequential_cpu_offload` does."""
    for model in pipe.components.values():
        if isinstance(model, nn.Module):
            accelerate.cpu_offload(model, CPU, offload_buffers=True)


def _skip_without_groups() -> None:
    """Skip a test where diffusers offloads in groups on machines with an accelerator alone, as 0.38 does."""
    try:
        apply_group_offloading(nn.Sequential(nn.Linear(1, 1)), CPU, CPU, offload_type="leaf_level")
    except AttributeError as error:
        assert torch.accelerator.current_accelerator() is None
        pytest.skip(f"The installed diffusers needs an accelerator for group offloading: {error}.")


def _in_groups(level: str) -> Callable[[Any], None]:
    def offload(pipe: Any) -> None:
        _skip_without_groups()
        blocks = 1 if level == "block_level" else None
        for model in components_with_sites(pipe.components).values():
            apply_group_offloading(model, CPU, CPU, offload_type=level, num_blocks_per_group=blocks)

    return offload


def _cast(storage: torch.dtype, compute: torch.dtype) -> Callable[[Any], None]:
    def cast(pipe: Any) -> None:
        pipe.to(dtype=compute)
        for model in components_with_sites(pipe.components).values():
            apply_layerwise_casting(model, storage, compute, skip_modules_pattern=("embed", "norm"))

    return cast


class _Quantised(nn.Linear):
    """As GGUF and bitsandbytes keep a layer: its weight is bytes, of another shape, with a scale beside it."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer.in_features, layer.out_features, layer.bias is not None)
        self.scale = layer.weight.data.abs().amax() / 127
        whole = (layer.weight.data / self.scale).round() + 128
        self.weight = nn.Parameter(whole.to(torch.uint8).reshape(-1, 1), requires_grad=False)
        self.bias = layer.bias

    def float_weight(self) -> torch.Tensor:
        return (self.weight.reshape(self.out_features, self.in_features).float() - 128) * self.scale

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(features, self.float_weight().to(features.dtype), self.bias)


def _linear_of(pipe: Any) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    denoiser = pipe.components[family_of(pipe.components).denoiser]
    for path, layer in list(denoiser.named_modules()):
        if type(layer) is nn.Linear:
            parent, _, name = path.rpartition(".")
            yield denoiser.get_submodule(parent), name, layer


def _quantised_by_hand(pipe: Any) -> None:
    for parent, name, layer in _linear_of(pipe):
        setattr(parent, name, _Quantised(layer))


def _quantised_by_torchao(kind: str) -> Callable[[Any], None]:
    def quantise(pipe: Any) -> None:
        torchao = pytest.importorskip("torchao.quantization")
        torchao.quantize_(pipe.components[family_of(pipe.components).denoiser], getattr(torchao, kind)())

    return quantise


def _quantised_by_bitsandbytes(bits: int) -> Callable[[Any], None]:
    def quantise(pipe: Any) -> None:
        bnb = pytest.importorskip("bitsandbytes").nn
        for parent, name, layer in _linear_of(pipe):
            sizes, weight = (layer.in_features, layer.out_features, layer.bias is not None), layer.weight.data
            if bits == 8:
                new = bnb.Linear8bitLt(*sizes, has_fp16_weights=False)
                new.weight = bnb.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
            else:
                new = bnb.Linear4bit(*sizes, compute_dtype=torch.float32, quant_type="nf4")
                new.weight = bnb.Params4bit(weight, requires_grad=False, quant_type="nf4")
            new.bias = layer.bias
            setattr(parent, name, new.to("cpu"))
        vars(pipe.components[family_of(pipe.components).denoiser])[f"is_loaded_in_{bits}bit"] = True

    return quantise


def _quantised_by_quanto(pipe: Any) -> None:
    quanto = pytest.importorskip("optimum.quanto")
    denoiser = pipe.components[family_of(pipe.components).denoiser]
    quanto.quantize(denoiser, weights=quanto.qint8)
    quanto.freeze(denoiser)


EXACT: dict[str, Callable[[Any], None]] = {
    "model offload": lambda pipe: pipe.enable_model_cpu_offload(device="cpu"),
    "sequential offload": _sequentially,
    "groups of blocks": _in_groups("block_level"),
    "groups of leaves": _in_groups("leaf_level"),
}
"""What leaves every number as it was."""
ROUNDED: dict[str, Callable[[Any], None]] = {
    "float8 stored, bfloat16 computed": _cast(torch.float8_e4m3fn, torch.bfloat16),
    "float8 stored, float32 computed": _cast(torch.float8_e5m2, torch.float32),
    "bfloat16 stored, float32 computed": _cast(torch.bfloat16, torch.float32),
    "bytes": _quantised_by_hand,
    "bytes, and groups of leaves": lambda pipe: (_quantised_by_hand(pipe), _in_groups("leaf_level")(pipe))[0],
    "torchao int8": _quantised_by_torchao("Int8WeightOnlyConfig"),
    "torchao float8": _quantised_by_torchao("Float8WeightOnlyConfig"),
    "bitsandbytes 8 bits": _quantised_by_bitsandbytes(8),
    "bitsandbytes 4 bits": _quantised_by_bitsandbytes(4),
    "quanto": _quantised_by_quanto,
}
"""What rounds the weights; the third party's where it is installed."""


def _dequantised(layer: nn.Module) -> torch.Tensor | None:
    """The weight that a layer computes with, where it is kept in another form."""
    weight = getattr(layer, "weight", None)
    if isinstance(layer, _Quantised):
        return layer.float_weight()
    if type(layer).__name__ == "Linear8bitLt":
        return weight.CB.float() * weight.SCB[:, None] / 127
    if type(layer).__name__ == "Linear4bit":
        return pytest.importorskip("bitsandbytes").functional.dequantize_4bit(weight.data, weight.quant_state)
    return weight.dequantize() if hasattr(weight, "dequantize") and type(weight.data) is not torch.Tensor else weight


def _plain_twin(pipe: Any, name: str, dtype: torch.dtype) -> Any:
    """A pipeline without hooks and quantisation, whose weights are those that the given one computes with."""
    twin = tiny_pipeline(name)
    twin.to(dtype=dtype)
    for component, model in components_with_sites(twin.components).items():
        theirs = dict(components_with_sites(pipe.components)[component].named_modules())
        for path, module in model.named_modules():
            weight = _dequantised(theirs[path])
            if isinstance(module, nn.Linear | nn.Conv2d | nn.Embedding) and weight is not None:
                module.weight.data = weight.detach().to(dtype).clone()
                if getattr(module, "bias", None) is not None:
                    module.bias.data = theirs[path].bias.detach().to(dtype).clone()  # type: ignore[union-attr]
    return twin


def _lora(pipe: Any, seed: int) -> dict[str, LowRank]:
    """Updates of one layer of each kind."""
    generator, chosen = torch.Generator().manual_seed(seed), {}
    for site, layer in linear_layers(pipe.components).items():
        if isinstance(layer, nn.Linear):
            chosen.setdefault(re.sub(r"\.\d+(?=\.)", "", site), (site, layer.in_features, layer.out_features))
    return {
        site: LowRank(
            down=torch.randn(2, width, generator=generator) * 0.1,
            up=torch.randn(height, 2, generator=generator) * 0.1,
            alpha=2.0,
        )
        for site, width, height in chosen.values()
    }


def _source(name: str, folder: Path, seed: int = 0) -> LoRASource:
    folder.mkdir(exist_ok=True)
    write_lora(folder / f"{seed}.safetensors", _lora(tiny_pipeline(name), seed))
    return LoRASource(folder / f"{seed}.safetensors", prompts=PROMPTS)


def _grams(pipe: Any, source: LoRASource) -> dict[str, torch.Tensor]:
    (concept,) = GradientFuser(pipe, **SMALL).record(source).concepts.values()
    return {one: concept.gram(one).matrix() for one in concept.inputs}


@cache
def _plain_grams(name: str) -> dict[str, torch.Tensor]:
    with tempfile.TemporaryDirectory() as folder:
        return _grams(tiny_pipeline(name), _source(name, Path(folder)))


def _fingerprint(pipe: Any) -> list[object]:
    """Modules, the hooks on them, and where and how their weights lie."""
    found: list[object] = []
    for model in components_with_sites(pipe.components).values():
        for path, module in model.named_modules():
            weights = [(key, one.dtype, one.device, one.requires_grad) for key, one in module.named_parameters()]
            theirs = tuple(getattr(getattr(module, "_diffusers_hook", None), "hooks", {}))
            ours = len(module._forward_pre_hooks)  # transformers leaves forward hooks of its own behind
            accelerates = type(getattr(module, "_hf_hook", None)).__name__
            found.append((path, id(module), weights, theirs, ours, accelerates))
    return found


@pytest.mark.parametrize("make", EXACT.values(), ids=EXACT)
@pytest.mark.parametrize("name", FAMILIES)
def test_offloaded_models_are_recorded_as_any_other(name: str, make: Callable[[Any], None], tmp_path: Path) -> None:
    pipe = tiny_pipeline(name)
    make(pipe)
    before = _fingerprint(pipe)
    found = _grams(pipe, _source(name, tmp_path / "offloaded"))
    assert _fingerprint(pipe) == before
    expected = _plain_grams(name)
    assert found.keys() == expected.keys()
    for one, gram in expected.items():
        torch.testing.assert_close(found[one], gram, rtol=ROUNDING, atol=ROUNDING * gram.abs().max().item())


@pytest.mark.parametrize("make", ROUNDED.values(), ids=ROUNDED)
@pytest.mark.parametrize("name", ["FLUX.1"])
def test_rounded_weights_are_recorded_as_plain_ones_of_the_same_values(
    name: str, make: Callable[[Any], None], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    pipe = tiny_pipeline(name)
    make(pipe)
    half = "bfloat16 computed" in request.node.callspec.id
    twin = _plain_twin(pipe, name, torch.bfloat16 if half else torch.float32)
    before = _fingerprint(pipe)
    found = _grams(pipe, _source(name, tmp_path / "rounded"))
    assert _fingerprint(pipe) == before
    expected = _grams(twin, _source(name, tmp_path / "plain"))
    # LoRA matrices keep their own dtype beside float8, and are rounded with the model elsewhere; bitsandbytes rounds
    # what goes into its layers of 8 bits, too.
    tolerance = 5e-2 if half or "bitsandbytes" in request.node.callspec.id else 2e-3
    for one, gram in expected.items():
        assert (found[one] - gram).norm() <= tolerance * gram.norm(), one


@pytest.mark.parametrize("make", [*EXACT.values(), ROUNDED["bytes"]], ids=[*EXACT, "bytes"])
def test_after_a_failure_they_are_as_they_came(make: Callable[[Any], None], tmp_path: Path) -> None:
    pipe = tiny_pipeline("FLUX.1")
    make(pipe)
    sources, before = [_source("FLUX.1", tmp_path, seed) for seed in (0, 1)], _fingerprint(pipe)

    def fail(*_: object) -> None:
        raise RuntimeError("failed on purpose")

    failing = pipe.transformer.single_transformer_blocks[1].norm.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="on purpose"):
        GradientFuser(pipe, **SMALL).fuse(sources)
    failing.remove()
    assert [row[:2] for row in _fingerprint(pipe)] == [row[:2] for row in before]  # type: ignore[index]
    assert GradientFuser(pipe, **SMALL).fuse(sources).lora
    assert _fingerprint(pipe) == before


@pytest.mark.parametrize("where", ["sequential", "leaf_level", "block_level"])
def test_updates_are_put_where_the_layer_computes(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights come for their turn from elsewhere; the meta device stands for a GPU, as nothing is computed here."""
    if where != "sequential":
        _skip_without_groups()
    monkeypatch.setattr(torch, "meta", torch.cpu, raising=False)  # diffusers asks for a module of the device
    pipe = tiny_pipeline("FLUX.1")
    if where == "sequential":
        accelerate.cpu_offload(pipe.transformer, CPU)
        for module in pipe.transformer.modules():
            if hasattr(module, "_hf_hook"):
                module._hf_hook.execution_device = "meta"
    else:
        blocks = 1 if where == "block_level" else None
        apply_group_offloading(pipe.transformer, META, CPU, offload_type=where, num_blocks_per_group=blocks)
    lora = {site: one for site, one in _lora(tiny_pipeline("FLUX.1"), 0).items() if site.startswith("transformer.")}
    inject(pipe.components, EDLoRA(concepts=(), embeddings={}, lora=lora, layers=(), base_model=""), "rex")
    placed = {site: linear_layers(pipe.components)[site].lora_A["rex"].weight.device for site in lora}
    assert set(placed.values()) == {META}
    eject(pipe.components, "rex")
    assert not [name for name, _ in pipe.transformer.named_parameters() if "lora" in name]


def _in_groups_with_streams(model: nn.Module, level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Offload in groups that streams bring. Streams are a GPU's, and those of the CPU do nothing; but diffusers keeps
    the same lists of weights for them."""
    _skip_without_groups()
    monkeypatch.setattr(torch.cpu.Stream, "synchronize", lambda self: None, raising=False)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda self: True)
    config = group_offloading.GroupOffloadingConfig(
        onload_device=CPU,
        offload_device=CPU,
        offload_type=group_offloading.GroupOffloadingType(level),
        non_blocking=True,
        record_stream=False,
        low_cpu_mem_usage=False,
        num_blocks_per_group=1 if level == "block_level" else None,
        stream=torch.cpu.Stream(),
    )
    group_offloading._apply_group_offloading(model, config)


def test_groups_of_blocks_that_streams_bring_know_the_new_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, plain = tiny_pipeline("FLUX.1"), tiny_pipeline("FLUX.1")
    _in_groups_with_streams(pipe.transformer, "block_level", monkeypatch)
    lora = EDLoRA(concepts=(), embeddings={}, lora=_lora(plain, 0), layers=(), base_model="")
    pictures = {}
    for loaded in (True, False):
        for name, one in {"streams": pipe, "plain": plain}.items():
            (inject if loaded else eject)(one.components, *([lora] if loaded else []), "rex")
            noise = torch.Generator().manual_seed(3)
            pictures[name] = one(
                "sks", num_inference_steps=1, height=32, width=32, generator=noise, output_type="latent"
            ).images
        torch.testing.assert_close(pictures["streams"], pictures["plain"])


def test_leaves_that_streams_bring_keep_their_hooks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each leaf is brought by itself, so that new layers beside it change nothing."""
    pipe = tiny_pipeline("FLUX.1")
    lora = EDLoRA(concepts=(), embeddings={}, lora=_lora(pipe, 0), layers=(), base_model="")
    _in_groups_with_streams(pipe.transformer, "leaf_level", monkeypatch)
    hooked = {id(module): module._diffusers_hook for module in pipe.transformer.modules() if _is_hooked(module)}
    hooks = {key: dict(registry.hooks) for key, registry in hooked.items()}
    assert len(hooks) > 10
    inject(pipe.components, lora, "rex")
    assert {key: registry.hooks for key, registry in hooked.items()} == hooks
    eject(pipe.components, "rex")
    assert {key: registry.hooks for key, registry in hooked.items()} == hooks


def _is_hooked(module: nn.Module) -> bool:
    return hasattr(module, "_diffusers_hook")


def test_layers_of_no_known_kind_are_named_before_anything_is_changed(tmp_path: Path) -> None:
    pipe = tiny_pipeline("FLUX.1")
    torch.ao.quantization.quantize_dynamic(pipe.transformer, {nn.Linear}, dtype=torch.qint8, inplace=True)
    before = [(path, id(module)) for path, module in pipe.transformer.named_modules()]
    with pytest.raises(ConfigurationError, match=r"to the layers of this FluxTransformer2DModel.*torchao"):
        GradientFuser(pipe, **SMALL).fuse([_source("FLUX.1", tmp_path, seed) for seed in (0, 1)])
    assert [(path, id(module)) for path, module in pipe.transformer.named_modules()] == before
    assert not hasattr(pipe.text_encoder, "peft_config")


@pytest.mark.parametrize(
    "make",
    [_quantised_by_hand, _cast(torch.float8_e4m3fn, torch.float32), _quantised_by_torchao("Int8WeightOnlyConfig")],
    ids=["bytes", "float8", "torchao"],
)
def test_updates_are_not_added_to_quantised_weights(make: Callable[[Any], None]) -> None:
    pipe = tiny_pipeline("Stable Diffusion")
    lora = EDLoRA(concepts=(), embeddings={}, lora=_lora(pipe, 0), layers=(), base_model="")
    make(pipe)
    before = _fingerprint(pipe)
    with pytest.raises(ConfigurationError, match=r"quantised.*half precision"), merged(pipe.components, lora):
        pytest.fail("the block was entered")
    assert _fingerprint(pipe) == before


def test_a_layer_with_several_hooks_computes_where_one_of_them_brings_it() -> None:
    """accelerate chains the hooks of a layer that somebody else has hooked already."""
    layer = nn.Linear(2, 2)
    accelerate.hooks.add_hook_to_module(layer, accelerate.hooks.ModelHook())
    assert find_onload_device(layer, layer) is None
    aligning = accelerate.hooks.AlignDevicesHook(execution_device="meta")
    accelerate.hooks.add_hook_to_module(layer, aligning, append=True)
    assert find_onload_device(layer, layer) == torch.device("meta")
