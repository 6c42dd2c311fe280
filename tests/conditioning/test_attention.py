"""What each cross-attention layer sees, and how contexts are blended."""

from dataclasses import replace

import pytest
import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.attention_processor import AttnProcessor
from peft.tuners.lora import LoraLayer

import packs
from diffusers_mixofshow.conditioning import attention
from diffusers_mixofshow.conditioning.attention import RegionPlan, layerwise_attention, regional_attention
from diffusers_mixofshow.errors import ConfigurationError, RegionError
from diffusers_mixofshow.families.layers import cross_attention_layers
from diffusers_mixofshow.lora import inject
from diffusers_mixofshow.regions import Isolation, Region, region_weights


LEFT = Region("left", box=(0, 0, 0.5, 1))
RIGHT = Region("right", box=(0.5, 0, 1, 1))


@pytest.fixture
def noise():
    return torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))


def _context(layers, seed=1):
    return torch.randn(2, layers * 77, 32, generator=torch.Generator().manual_seed(seed))


def _run(unet, noise, context):
    with torch.no_grad():
        return unet(noise, 5, encoder_hidden_states=context).sample


def _record(unet, seen):
    """Hooks that note the text which every cross-attention layer projects to keys."""
    return [
        unet.get_submodule(path).to_k.register_forward_pre_hook(
            lambda _module, inputs, path=path: seen.setdefault(path, []).append(inputs[0])
        )
        for path in cross_attention_layers(unet)
    ]


def test_layer_k_sees_encoding_k(unet, layers, noise):
    seen = {}
    hooks = _record(unet, seen)
    context = _context(layers)
    with layerwise_attention(unet):
        _run(unet, noise, context)
    for hook in hooks:
        hook.remove()
    for layer, path in enumerate(cross_attention_layers(unet)):
        assert torch.equal(seen[path][0], context[:, layer * 77 : (layer + 1) * 77])


def test_the_same_encoding_for_all_layers_is_plain_attention(unet, layers, noise):
    context = _context(1)
    expected = _run(unet, noise, context)
    with layerwise_attention(unet):
        assert torch.equal(_run(unet, noise, context), expected)
        assert torch.equal(_run(unet, noise, context.repeat(1, layers, 1)), expected)


def test_pictures_may_share_texts(unet, layers):
    noise = torch.randn(3, 4, 16, 16, generator=torch.Generator().manual_seed(3))
    texts, text_of = _context(layers), torch.tensor([1, 0, 1])
    with layerwise_attention(unet) as shared:
        expected = _run(unet, noise, texts[text_of])
        shared.text_of = text_of
        torch.testing.assert_close(_run(unet, noise, texts), expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(_run(unet, noise, texts[text_of]), expected)


def test_a_stack_for_another_model_is_refused(unet, layers, noise):
    with layerwise_attention(unet), pytest.raises(ConfigurationError, match=str((layers + 1) * 77)):
        _run(unet, noise, _context(layers + 1))


def test_processors_come_back_also_on_errors(unet, noise):
    originals = dict(unet.attn_processors)
    modules = [name for name, _ in unet.named_modules()]
    with pytest.raises(ConfigurationError), layerwise_attention(unet), regional_attention(unet, RegionPlan([LEFT])):
        _run(unet, noise, _context(3))
    assert all(unet.attn_processors[name] is processor for name, processor in originals.items())
    assert [name for name, _ in unet.named_modules()] == modules
    assert not unet._forward_pre_hooks


def test_positions_of_a_region_get_plain_attention_with_its_context(unet, layers, noise):
    contexts = [_context(1, seed) for seed in range(3)]
    regions = [Region("a", box=(0, 0, 0.4, 0.9)), Region("b", box=(0.6, 0.3, 1, 1))]
    path = cross_attention_layers(unet)[0]
    attention = unet.get_submodule(path)
    queries = []
    hook = attention.register_forward_hook(lambda _module, inputs, output: queries.append((inputs[0], output)))
    with regional_attention(unet, RegionPlan(regions)):
        _run(unet, noise, torch.cat(contexts, dim=1))
    hook.remove()
    hidden, output = queries[0]
    weights = region_weights(regions, 8, 8).flatten(1)
    with torch.no_grad():
        plain = [attention(hidden, encoder_hidden_states=context) for context in contexts]
    for weight, expected in zip([1 - weights.sum(0), *weights], plain, strict=True):
        inside = weight == 1
        assert inside.any()
        assert torch.allclose(output[:, inside], expected[:, inside], atol=1e-6)


def test_overlaps_are_the_mean_of_their_contexts(unet, noise):
    contexts = [_context(1, seed) for seed in range(3)]
    regions = [Region("a", box=(0, 0, 1, 1)), Region("b", box=(0, 0, 1, 1))]
    attention = unet.get_submodule(cross_attention_layers(unet)[0])
    calls = []
    hook = attention.register_forward_hook(lambda _module, inputs, output: calls.append((inputs[0], output)))
    with regional_attention(unet, RegionPlan(regions)):
        _run(unet, noise, torch.cat(contexts, dim=1))
    hook.remove()
    hidden, output = calls[0]
    with torch.no_grad():
        mean = sum(attention(hidden, encoder_hidden_states=context) for context in contexts[1:]) / 2
    assert torch.allclose(output, mean, atol=1e-6)


def test_each_context_is_computed_only_where_it_holds(unet, noise, monkeypatch):
    lengths = []

    def attend(query, key, value):
        lengths.append(query.shape[1])
        return dispatch_attention_fn(query, key, value)

    monkeypatch.setattr(attention, "dispatch_attention_fn", attend)
    with regional_attention(unet, RegionPlan([LEFT, RIGHT])):
        _run(unet, noise, _context(3))
    assert lengths == [32, 32] * len(cross_attention_layers(unet))


def test_a_foreign_processor_is_run_only_where_its_context_holds(unet, noise):
    path = cross_attention_layers(unet)[0]
    lengths = []
    hook = unet.get_submodule(path).to_q.register_forward_hook(
        lambda _module, _inputs, output: lengths.append(output.shape[1])
    )
    unet.set_attn_processor(AttnProcessor())
    with regional_attention(unet, RegionPlan([LEFT, RIGHT])):
        _run(unet, noise, _context(3))
    hook.remove()
    assert lengths == [32, 32]


def test_keys_of_a_text_are_computed_once_and_anew_for_another_text(unet, layers, noise):
    calls = []
    unet.get_submodule(cross_attention_layers(unet)[0]).to_k.register_forward_hook(
        lambda _module, inputs, _output: calls.append(inputs[0].clone())
    )
    context, other = _context(3 * layers), _context(3 * layers, seed=5)
    with layerwise_attention(unet), regional_attention(unet, RegionPlan([LEFT, RIGHT])):
        first = _run(unet, noise, context)
        assert torch.equal(_run(unet, noise, context), first)
        assert len(calls) == 1
        changed = _run(unet, noise, other)
        assert not torch.allclose(changed, first, atol=1e-4)
        context.copy_(other)
        assert torch.equal(_run(unet, noise, context), changed)
    assert len(calls) == 3


def test_each_picture_has_its_own_plan(unet, layers):
    plans = [RegionPlan([LEFT]), RegionPlan([RIGHT, LEFT]), RegionPlan([])]
    noise = torch.randn(6, 4, 16, 16)
    context = torch.randn(6, 3 * layers * 77, 32)
    with layerwise_attention(unet):
        with regional_attention(unet, plans):
            together = _run(unet, noise, context)
        for row in range(6):
            plan = plans[row % 3]
            own = context[row : row + 1, : plan.contexts * layers * 77]
            with regional_attention(unet, plan):
                assert torch.allclose(_run(unet, noise[row : row + 1], own)[0], together[row], atol=1e-5)
        with regional_attention(unet, plans), pytest.raises(RegionError, match=r"3 pictures.*batch of 4"):
            _run(unet, noise[:4], context[:4])


def test_regions_hold_from_their_start_to_their_end(unet, noise):
    contexts = _context(2)
    timed = RegionPlan([Region("a", box=(0, 0, 0.5, 1), start=0.25, end=0.75)])
    with regional_attention(unet, RegionPlan([LEFT])):
        inside = _run(unet, noise, contexts)
    outside = _run(unet, noise, contexts[:, :77])
    with regional_attention(unet, timed, steps=lambda: 4) as canvas:
        seen = [_run(unet, noise, contexts) for _ in range(4)]
        assert canvas.step == 3
    for result, expected in zip(seen, [outside, inside, inside, outside], strict=True):
        assert torch.allclose(result, expected, atol=1e-5)


@pytest.mark.parametrize("size", [(16, 16), (16, 8), (10, 22), (2, 6)])
def test_a_full_region_is_the_prompt_itself_at_any_size(unet, layers, size):
    noise = torch.randn(2, 4, *size)
    context = _context(layers)
    with layerwise_attention(unet):
        expected = _run(unet, noise, context)
        with regional_attention(unet, RegionPlan([Region("all", box=(0, 0, 1, 1))])):
            assert torch.equal(_run(unet, noise, torch.cat([torch.zeros_like(context), context], dim=1)), expected)
        with regional_attention(unet, RegionPlan([LEFT, RIGHT, Region("x", box=(0.3, 0.4, 0.31, 0.41))])):
            assert torch.allclose(_run(unet, noise, context.repeat(1, 4, 1)), expected, atol=1e-5)


def test_weights_sum_to_one_and_need_no_rounding_leftovers():
    regions = [Region("a", box=(0, 0, 1, 1))] * 3
    weights = RegionPlan(regions).weights(4, 4)
    assert torch.equal(weights[0], torch.zeros(16, dtype=torch.float64))
    assert torch.allclose(RegionPlan([LEFT, *regions]).weights(4, 4).sum(0), torch.ones(16, dtype=torch.float64))


def _scale(unet):
    for module in unet.modules():
        if isinstance(module, LoraLayer):
            module.set_scale("one", 0.5)


CHANGES = {
    "a strength": _scale,
    "other adapters": lambda unet: unet.set_adapter("two"),
    "both adapters": lambda unet: unet.set_adapter(["one", "two"]),
    "none": lambda unet: unet.disable_adapters(),
    "fused at another strength": lambda unet: unet.fuse_lora(lora_scale=0.3, adapter_names=["one"]),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("half", ["to_k", "to_v"])
def test_keys_of_a_text_are_computed_anew_for_another_lora(components, unet, layers, noise, change, half):
    for number, name in enumerate(("one", "two")):
        pack = packs.random_pack(components, seed=number)
        pack = replace(
            pack, lora={site: update for site, update in pack.lora.items() if site.endswith(f"attn2.{half}")}
        )
        inject({"unet": unet}, pack, name)
    unet.set_adapter("one")
    text = _context(layers)
    with layerwise_attention(unet):
        before = _run(unet, noise, text)
        change(unet)
        kept = _run(unet, noise, text)
        assert torch.equal(kept, _run(unet, noise, text.clone()))
    assert not torch.allclose(kept, before, atol=1e-4)


def test_a_text_that_changes_unseen_is_projected_each_time(unet, layers, noise):
    """In inference mode nobody counts the changes of a tensor."""
    with torch.inference_mode(), layerwise_attention(unet):
        text = _context(layers)
        before = _run(unet, noise, text)
        text.mul_(0.5)
        after = _run(unet, noise, text)
        assert torch.equal(after, _run(unet, noise, text.clone()))
        assert not torch.allclose(after, before, atol=1e-4)


def test_gradients_reach_the_text_in_every_pass(unet, layers, noise):
    text = _context(layers).requires_grad_()
    gradients = []
    with layerwise_attention(unet):
        for _ in range(2):
            (gradient,) = torch.autograd.grad(unet(noise, 5, encoder_hidden_states=text).sample.sum(), text)
            gradients.append(gradient)
    assert torch.equal(*gradients)
    assert gradients[0].abs().sum() > 0


@pytest.mark.parametrize("isolation", [None, Isolation()])
def test_masks_for_the_attention_of_a_pass_are_handed_on(unet, noise, isolation):
    """A mask of positions in self-attention, and one of the text's tokens in cross-attention."""
    region = Region("everywhere", box=(0, 0, 1, 1))
    text = torch.randn(2, 77, 32, generator=torch.Generator().manual_seed(3))
    masks = {"encoder_attention_mask": torch.tensor([[1] * 20 + [0] * 57] * 2)}
    with torch.no_grad():
        plain, expected = (unet(noise, 5, encoder_hidden_states=text, **given).sample for given in ({}, masks))
        with regional_attention(unet, RegionPlan([region]), isolation=isolation):
            found = unet(noise, 5, encoder_hidden_states=torch.cat([text, text], dim=1), **masks).sample
    assert torch.allclose(found, expected, atol=1e-5)
    assert not torch.allclose(found, plain, atol=1e-3)
