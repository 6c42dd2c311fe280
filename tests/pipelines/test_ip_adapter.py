"""IP-Adapters keep working inside layer-wise and regional attention."""

import pytest
import torch

import tiny
from diffusers_mixofshow.families.layers import cross_attention_layers
from diffusers_mixofshow.regions import Region


@pytest.fixture
def with_image(pipe, make_pack):
    """The pipeline with one concept and a random IP-Adapter of four tokens."""
    pipe.load_edlora(make_pack("potter"))
    tiny.add_ip_adapter(pipe.unet)
    return pipe


def _image(seed=0):
    return [torch.randn(2, 1, 8, generator=torch.Generator().manual_seed(seed)) * 3]


def _mask():
    mask = torch.zeros(1, 1, 32, 32)
    mask[..., 16:] = 1
    return {"ip_adapter_masks": [mask]}


def test_without_concepts_it_is_the_parent(with_image, parent, latents):
    arguments = {"ip_adapter_image_embeds": _image(), "cross_attention_kwargs": _mask()}
    assert torch.equal(latents(with_image, "a dog", **arguments), latents(parent, "a dog", **arguments))


@pytest.mark.parametrize("attention", [None, _mask()], ids=["everywhere", "masked"])
def test_a_full_region_is_the_prompt_with_the_image(with_image, latents, attention):
    arguments = {"ip_adapter_image_embeds": _image(), "cross_attention_kwargs": attention}
    everywhere = [Region("a <potter>", box=(0, 0, 0.4, 1)), Region("a <potter>", box=(0.3, 0, 1, 1))]
    alone = latents(with_image, "a <potter>", **arguments)
    assert torch.allclose(latents(with_image, "other", regions=everywhere, **arguments), alone, atol=1e-4)
    other = latents(with_image, "a <potter>", **{**arguments, "ip_adapter_image_embeds": _image(1)})
    assert not torch.allclose(other, alone, atol=1e-4)


@torch.no_grad()
def test_each_region_is_its_own_prompt_with_the_image(with_image, latents):
    """In every layer, a region's cells are those of plain attention to its prompt, image, mask and all."""
    halves = {"a dog": (0, 0, 0.5, 1), "a cat": (0.5, 0, 1, 1)}
    seen = {}

    def note(path):
        def hook(_layer, inputs, named, output):
            seen[path] = (inputs[0] if inputs else named["hidden_states"], named, output)

        return hook

    paths = cross_attention_layers(with_image.unet)
    hooks = [with_image.unet.get_submodule(path).register_forward_hook(note(path), with_kwargs=True) for path in paths]
    regions = [Region(prompt, box=box) for prompt, box in halves.items()]
    arguments = {"ip_adapter_image_embeds": [_image()[0][:1]], "cross_attention_kwargs": _mask(), "guidance_scale": 1}
    latents(with_image, "a picture", regions=regions, num_inference_steps=1, **arguments)
    for hook in hooks:
        hook.remove()
    assert len(seen) == len(paths)
    texts = [with_image.encode_prompt(prompt, "cpu", 1, False)[0] for prompt in halves]
    for path, (states, named, output) in seen.items():
        images = named["encoder_hidden_states"][1]
        attention = with_image.unet.get_submodule(path)
        plain = [
            attention(states, encoder_hidden_states=(text, images), ip_adapter_masks=named["ip_adapter_masks"])
            for text in texts
        ]
        side = round(states.shape[1] ** 0.5)
        left = (torch.arange(states.shape[1]) % side < side // 2)[None, :, None]
        torch.testing.assert_close(output, torch.where(left, *plain), atol=1e-5, rtol=1e-5, msg=path)


def test_the_adapter_is_back_in_its_place(with_image, latents):
    weights = {name: value.clone() for name, value in with_image.unet.state_dict().items()}
    processors = dict(with_image.unet.attn_processors)
    regions = [Region("a <potter>", box=(0, 0, 0.5, 1))]
    latents(with_image, "x", regions=regions, ip_adapter_image_embeds=_image())
    assert all(with_image.unet.attn_processors[name] is processor for name, processor in processors.items())
    after = with_image.unet.state_dict()
    assert list(after) == list(weights)
    assert all(torch.equal(after[name], value) for name, value in weights.items())
