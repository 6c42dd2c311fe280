"""What is computed in another way gives the same."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from diffusers import StableDiffusionPipeline

from diffusers_mixofshow.lora import trainable
from diffusers_mixofshow.training.compute import compile_model, recompute_activations, speed_up_updates
from diffusers_mixofshow.training.samples import scale_lora


def attributes(*models: torch.nn.Module) -> list[dict[str, object]]:
    return [dict(vars(module)) for model in models for module in model.modules()]


@pytest.mark.parametrize("fails", [False, True])
def test_activations_are_computed_again_inside_the_block_alone(pipeline: StableDiffusionPipeline, fails: bool) -> None:
    """Blocks ask for training mode; their children, whose dropout would wake, stay as they were."""
    models = (pipeline.unet, pipeline.text_encoder)
    blocks = [each for model in models for each in model.modules() if hasattr(each, "gradient_checkpointing")]
    others = [each for model in models for each in model.modules() if each not in blocks]
    vars(blocks[0])["_gradient_checkpointing_func"] = theirs = object()
    blocks[1].training = True
    before = attributes(*models)
    assert len(blocks) > 4
    with pytest.raises(KeyError) if fails else nullcontext(), recompute_activations(*models):
        assert all(each.gradient_checkpointing and each.training for each in blocks)
        assert all(each._gradient_checkpointing_func is not theirs for each in blocks)
        assert not any(each.training for each in others)
        if fails:
            raise KeyError
    assert attributes(*models) == before
    assert blocks[0]._gradient_checkpointing_func is theirs


def test_recomputed_activations_give_the_same_gradients_in_less_memory(pipeline: StableDiffusionPipeline) -> None:
    unet, generator = pipeline.unet, torch.Generator().manual_seed(0)
    inputs = torch.randn(1, 4, 16, 16, generator=generator), 5, torch.randn(1, 7, 32, generator=generator)
    runs: list[int] = []
    hook = unet.down_blocks[1].resnets[0].register_forward_pre_hook(lambda *given: runs.append(1))
    weight = unet.conv_in.weight

    def gradient() -> torch.Tensor:
        return torch.autograd.grad(unet(*inputs).sample.square().mean(), weight)[0]

    expected = gradient()
    assert len(runs) == 1
    with recompute_activations(unet):
        torch.testing.assert_close(gradient(), expected)
    hook.remove()
    assert len(runs) == 3


@pytest.mark.parametrize("fails", [False, True])
def test_a_compiled_model_shares_its_weights_and_keeps_no_marks(monkeypatch: pytest.MonkeyPatch, fails: bool) -> None:
    def compile_with_a_mark(module: torch.nn.Module) -> torch.nn.Module:
        module.mark = 1
        return torch.nn.Sequential(module)

    monkeypatch.setattr(torch, "compile", compile_with_a_mark)
    model = torch.nn.Linear(2, 2)
    model.mine = "kept"
    before = set(vars(model))
    with pytest.raises(KeyError) if fails else nullcontext(), compile_model(model) as made:
        assert made[0] is model
        assert model.mark == 1
        if fails:
            raise KeyError
    assert set(vars(model)) == before
    assert model.mine == "kept"


def test_lean_updates_are_those_of_peft(pipeline: StableDiffusionPipeline) -> None:
    with trainable(pipeline.components, 2, 6.0) as lora:
        layers = list(lora.layers.values())
        for number, layer in enumerate(layers):
            layer.lora_B[lora.adapter_name].weight.data.normal_(generator=torch.Generator().manual_seed(number))
        inputs = [torch.randn(2, 5, layer.in_features, generator=torch.Generator().manual_seed(9)) for layer in layers]
        expected = [layer(each) for layer, each in zip(layers, inputs, strict=True)]
        matrices = [each[lora.adapter_name].weight for layer in layers for each in (layer.lora_A, layer.lora_B)]
        gradients = torch.autograd.grad(sum(each.square().mean() for each in expected), matrices)
        with speed_up_updates(lora):
            outputs = [layer(each) for layer, each in zip(layers, inputs, strict=True)]
        torch.testing.assert_close(outputs, expected)
        lean = torch.autograd.grad(sum(each.square().mean() for each in outputs), matrices)
        torch.testing.assert_close(lean, gradients)
        assert not any("forward" in vars(layer) for layer in layers)


def test_lean_updates_follow_what_is_set_inside_the_block(pipeline: StableDiffusionPipeline) -> None:
    with trainable(pipeline.components, 2, 6.0) as lora:
        layer = next(iter(lora.layers.values()))
        layer.lora_B[lora.adapter_name].weight.data.fill_(0.5)
        inputs = torch.randn(2, 5, layer.in_features, generator=torch.Generator().manual_seed(0))
        base, full = layer.get_base_layer()(inputs), layer(inputs)
        with speed_up_updates(lora):
            with scale_lora(lora, 0.0):
                torch.testing.assert_close(layer(inputs), base)
            with scale_lora(lora, 0.5):
                torch.testing.assert_close(layer(inputs), (base + full) / 2)
            layer.enable_adapters(False)
            torch.testing.assert_close(layer(inputs), base)
            layer.enable_adapters(True)
            torch.testing.assert_close(layer(inputs), full)


def test_lean_updates_give_back_the_forward_that_was_there(pipeline: StableDiffusionPipeline) -> None:
    with trainable(pipeline.components, 2, 6.0) as lora:
        layer = next(iter(lora.layers.values()))
        theirs = layer.forward
        layer.forward = theirs  # as the hooks of accelerate do
        with speed_up_updates(lora):
            assert layer.forward is not theirs
        assert layer.forward is theirs
