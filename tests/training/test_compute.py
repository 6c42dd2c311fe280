"""What is computed in another way gives the same."""

from __future__ import annotations

import torch
from diffusers import StableDiffusionPipeline

from diffusers_mixofshow.lora import trainable
from diffusers_mixofshow.training.compute import lean_updates
from diffusers_mixofshow.training.samples import scale_lora


def test_lean_updates_are_those_of_peft(pipeline: StableDiffusionPipeline) -> None:
    with trainable(pipeline.components, 2, 6.0) as lora:
        layers = list(lora.layers.values())
        for number, layer in enumerate(layers):
            layer.lora_B[lora.adapter_name].weight.data.normal_(generator=torch.Generator().manual_seed(number))
        inputs = [torch.randn(2, 5, layer.in_features, generator=torch.Generator().manual_seed(9)) for layer in layers]
        expected = [layer(each) for layer, each in zip(layers, inputs, strict=True)]
        matrices = [each[lora.adapter_name].weight for layer in layers for each in (layer.lora_A, layer.lora_B)]
        gradients = torch.autograd.grad(sum(each.square().mean() for each in expected), matrices)
        with lean_updates(lora):
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
        with lean_updates(lora):
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
        with lean_updates(lora):
            assert layer.forward is not theirs
        assert layer.forward is theirs
