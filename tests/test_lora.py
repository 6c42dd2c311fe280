"""Updates merged, injected and trained: the right effect while they are there, no trace afterwards."""

from __future__ import annotations

import contextlib
import warnings

import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft.tuners.lora import LoraLayer
from torch import nn

import packs
import tiny
from diffusers_mixofshow.edlora import EDLoRA, LowRank
from diffusers_mixofshow.edlora.low_rank import low_rank_delta
from diffusers_mixofshow.errors import ConfigurationError, EDLoRAFormatError
from diffusers_mixofshow.families.layers import adapted_layers
from diffusers_mixofshow.lora import eject, find_holders, inject, merged, trainable


@pytest.fixture(params=["flat", "nested"])
def components(request):
    """Tiny models in float64, the text encoder in the spelling of either transformers generation."""
    made = tiny.components()
    if request.param == "nested":
        made = packs.with_nested_text_encoder(made)
    for name in ("unet", "text_encoder"):
        made[name].double()
    return made


@pytest.fixture
def flat():
    return tiny.components()


def outputs(components, scale=None):
    """What both models compute, concatenated."""
    generator = torch.Generator().manual_seed(7)
    dtype = components["unet"].dtype
    ids = torch.randint(0, 100, (1, 77), generator=generator)
    noisy = torch.randn(1, 4, 16, 16, generator=generator).to(dtype)
    keywords = {} if scale is None else {"scale": scale}
    with torch.no_grad():
        text = components["text_encoder"](ids, output_hidden_states=True).hidden_states[-1]
        noise = components["unet"](noisy, torch.tensor([5]), text, cross_attention_kwargs=keywords).sample
    return torch.cat([text.flatten(), noise.flatten()])


def state(components):
    """Identity and value of everything that could be left changed."""
    found = {}
    for name in ("unet", "text_encoder"):
        model = components[name]
        found |= {(name, path, "module"): (id(module), type(module)) for path, module in model.named_modules()}
        found |= {(name, path, "training"): module.training for path, module in model.named_modules()}
        found |= {(name, path, "flag"): p.requires_grad for path, p in model.named_parameters()}
        found |= {(name, path, "weight"): (id(p), p.detach().clone()) for path, p in model.named_parameters()}
        found[name, "attributes"] = {key for key in vars(model) if "peft" in key}
    return found


def assert_unchanged(before, components):
    after = state(components)
    assert before.keys() == after.keys()
    for key, value in before.items():
        if key[-1] == "weight":
            assert value[0] == after[key][0], key
            packs.assert_identical(value[1], after[key][1])
        else:
            assert value == after[key], key


def test_delta_is_alpha_over_rank_times_the_product():
    update = LowRank(down=torch.tensor([[1.0, 2.0]]), up=torch.tensor([[3.0], [4.0]]), alpha=0.5)
    assert torch.equal(low_rank_delta(update), torch.tensor([[1.5, 3.0], [2.0, 4.0]]))


def test_delta_of_half_precision_is_computed_in_float32():
    update = LowRank(down=torch.full((2, 3), 300.0).half(), up=torch.full((3, 2), 300.0).half(), alpha=2)
    assert torch.equal(low_rank_delta(update), torch.full((3, 3), 180000.0))


def test_merged_adds_the_scaled_delta_to_every_site(components):
    pack = packs.random_pack(components, ranks=(4, 2), alphas=(1.0, 4.0, 3.0))
    before = {site: layer.weight.detach().clone() for site, layer in adapted_layers(components).items()}
    with merged(components, pack, scale=0.7):
        for site, layer in adapted_layers(components).items():
            expected = before[site] + 0.7 * low_rank_delta(pack.lora[site]).double()
            torch.testing.assert_close(layer.weight.detach(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("fails", [False, True])
def test_merged_restores_bit_for_bit_also_after_an_error(components, fails):
    pack, before, base = packs.random_pack(components), state(components), outputs(components)
    with contextlib.suppress(ZeroDivisionError), merged(components, pack):
        assert not torch.equal(outputs(components), base)
        if fails:
            raise ZeroDivisionError
    assert_unchanged(before, components)


def test_merged_restores_half_precision_weights(flat):
    flat["unet"].to(torch.bfloat16)
    before = state(flat)
    with merged(flat, packs.random_pack(flat)):
        assert flat["unet"].dtype == torch.bfloat16
    assert_unchanged(before, flat)


def test_merged_packs_nest(components):
    one, two = packs.random_pack(components, seed=1), packs.random_pack(components, seed=2)
    before = state(components)
    with merged(components, one), merged(components, two):
        pass
    assert_unchanged(before, components)


def test_merged_touches_only_the_given_components(flat):
    text = flat["text_encoder"].state_dict()
    copies = {key: value.clone() for key, value in text.items()}
    with merged({"unet": flat["unet"]}, packs.random_pack(flat)):
        for key, value in flat["text_encoder"].state_dict().items():
            packs.assert_identical(value, copies[key])


def test_merged_goes_below_injected_adapters(components):
    below, above = packs.random_pack(components, seed=1), packs.random_pack(components, seed=2)
    with merged(components, below), merged(components, above):
        expected = outputs(components)
    inject(components, above, "above")
    with merged(components, below):
        torch.testing.assert_close(outputs(components), expected)


def test_weights_of_which_attention_reads_copies_are_not_merged_into(flat):
    flat["unet"].fuse_qkv_projections()
    before = {name: weight.clone() for name, weight in flat["unet"].state_dict().items()}
    with (
        pytest.raises(ConfigurationError, match=r"copies.*pipe\.unet\.unfuse_qkv_projections\(\)"),
        merged(flat, packs.random_pack(flat)),
    ):
        pytest.fail("the block was entered")
    torch.testing.assert_close(flat["unet"].state_dict(), before, atol=0, rtol=0)
    flat["unet"].unfuse_qkv_projections()
    with merged(flat, packs.random_pack(flat)):
        pass


def test_a_pack_for_another_model_changes_nothing(flat):
    pack = packs.random_pack(flat)
    flat["unet"].mid_block.attentions[0].transformer_blocks[0].attn2.to_k = nn.Linear(16, 64, bias=False)
    before = state(flat)
    for borrow in (lambda: inject(flat, pack, "rex"), lambda: merged(flat, pack).__enter__()):
        with pytest.raises(EDLoRAFormatError, match=r"mid_block.*attn2\.to_k \(64, 32\), in the model \(64, 16\)"):
            borrow()
        assert_unchanged(before, flat)


@pytest.mark.parametrize("scale", [1.0, 0.4])
def test_injected_equals_merged_also_with_mixed_ranks_and_alphas(components, scale):
    pack = packs.random_pack(components, ranks=(4, 2, 3), alphas=(4.0, 1.0))
    with merged(components, pack, scale):
        expected = outputs(components)
    inject(components, pack, "rex", scale)
    torch.testing.assert_close(outputs(components), expected)


def test_two_injected_packs_add_up_and_leave_one_by_one(components):
    one, two = packs.random_pack(components, seed=1), packs.random_pack(components, seed=2)
    before = state(components)
    with merged(components, two, 0.5):
        expected_two = outputs(components)
        with merged(components, one):
            expected_both = outputs(components)
    inject(components, one, "one")
    inject(components, two, "two", 0.5)
    torch.testing.assert_close(outputs(components), expected_both)
    eject(components, "one")
    torch.testing.assert_close(outputs(components), expected_two)
    eject(components, "two")
    assert_unchanged(before, components)


def test_ejecting_leaves_a_sleeping_adapter_asleep(flat):
    base = outputs(flat)
    inject(flat, packs.random_pack(flat, seed=1), "sleeping")
    inject(flat, packs.random_pack(flat, seed=2), "awake")
    pipe = StableDiffusionPipeline(**flat)
    pipe.set_adapters("awake")
    eject(flat, "awake")
    torch.testing.assert_close(outputs(flat), base)
    assert pipe.get_list_adapters() == {"unet": ["sleeping"], "text_encoder": ["sleeping"]}


def test_injecting_keeps_flags_random_state_and_is_silent(components, recwarn, capfd):
    components["unet"].requires_grad_(False)
    flags = {id(p): p.requires_grad for name in ("unet", "text_encoder") for p in components[name].parameters()}
    random_state = torch.get_rng_state()
    pack = packs.random_pack(components)
    inject(components, pack, "one")
    inject(components, pack, "two")
    eject(components, "one")
    assert torch.equal(torch.get_rng_state(), random_state)
    for name in ("unet", "text_encoder"):
        for parameter in components[name].parameters():
            assert parameter.requires_grad == flags.get(id(parameter), False)
    assert not recwarn.list
    assert capfd.readouterr() == ("", "")


def test_diffusers_sees_and_steers_injected_adapters(flat):
    pack, base = packs.random_pack(flat), outputs(flat)
    with merged({"unet": flat["unet"]}, pack, 0.3):
        expected_unet = outputs(flat)
    pipe = StableDiffusionPipeline(**flat)
    inject(pipe.components, pack, "rex")
    assert pipe.get_list_adapters() == {"unet": ["rex"], "text_encoder": ["rex"]}
    assert pipe.get_active_adapters() == ["rex"]
    pipe.set_adapters("rex", {"unet": 0.3, "text_encoder": 0.0})
    torch.testing.assert_close(outputs(flat), expected_unet, rtol=1e-4, atol=1e-4)
    pipe.set_adapters("rex", {"unet": 1.0, "text_encoder": 0.0})
    torch.testing.assert_close(outputs(flat, scale=0.3), expected_unet, rtol=1e-4, atol=1e-4)
    pipe.disable_lora()
    torch.testing.assert_close(outputs(flat), base)


def test_injected_beside_a_stock_lora(flat, tmp_path):
    stock, ours = packs.random_pack(flat, seed=1), packs.random_pack(flat, seed=2)
    stock.save_pretrained(tmp_path)
    with merged(flat, stock), merged(flat, ours):
        expected = outputs(flat)
    pipe = StableDiffusionPipeline(**flat)
    pipe.load_lora_weights(tmp_path, adapter_name="stock")
    inject(flat, ours, "ours")
    torch.testing.assert_close(outputs(flat), expected, rtol=1e-4, atol=1e-4)
    eject(flat, "ours")
    assert pipe.get_list_adapters() == {"unet": ["stock"], "text_encoder": ["stock"]}


def test_injected_takes_the_models_dtype(flat):
    flat["unet"].half()
    inject(flat, packs.random_pack(flat), "rex")
    assert {parameter.dtype for parameter in flat["unet"].parameters()} == {torch.float16}


@pytest.mark.parametrize("name", ["rex", "a.b", ""])
def test_taken_and_malformed_names_are_refused_and_harm_nothing(flat, name):
    pack = packs.random_pack(flat)
    inject(flat, pack, "rex")
    expected, before = outputs(flat), state(flat)
    with pytest.raises(ConfigurationError, match=r"rex|letters"):
        inject(flat, pack, name)
    assert_unchanged(before, flat)
    assert torch.equal(outputs(flat), expected)


def test_ejecting_what_diffusers_has_deleted_does_no_harm(flat):
    before = state(flat)
    inject(flat, packs.random_pack(flat), "rex")
    pipe = StableDiffusionPipeline(**flat)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe.delete_adapters("rex")
    eject(flat, "rex")
    after = state(flat)
    assert {k: v for k, v in before.items() if k[-1] == "module"} == {
        k: v for k, v in after.items() if k[-1] == "module"
    }
    inject(flat, packs.random_pack(flat), "rex")


def test_fused_adapters_are_refused_in_both_directions(flat):
    pack, base = packs.random_pack(flat), outputs(flat)
    pipe = StableDiffusionPipeline(**flat)
    inject(flat, pack, "rex")
    pipe.fuse_lora()
    for action in (lambda: inject(flat, pack, "tom"), lambda: eject(flat, "rex")):
        with pytest.raises(ConfigurationError, match="unfuse_lora"):
            action()
    pipe.unfuse_lora()
    eject(flat, "rex")
    torch.testing.assert_close(outputs(flat), base, rtol=1e-4, atol=1e-4)


def test_offloaded_weights_are_refused(flat):
    pack = packs.random_pack(flat)
    flat["unet"].to("meta")
    with pytest.raises(ConfigurationError, match="not in memory"):
        inject(flat, pack, "rex")


def test_trainable_starts_without_effect_and_leaves_no_trace(components):
    before, base = state(components), outputs(components)
    with trainable(components, rank=3, alpha=1.5) as fresh:
        assert torch.equal(outputs(components), base)
        start = fresh.read()
        assert start.keys() == adapted_layers(components).keys()
        for update in start.values():
            assert (update.rank, update.alpha) == (3, 1.5)
            assert update.down.dtype == update.up.dtype == torch.float32
            assert update.down.abs().sum() > 0
            assert update.up.abs().sum() == 0
    assert_unchanged(before, components)


def matrices(fresh, beginning=""):
    """The halves of all layers whose sites begin so."""
    of_layers = [layer for site, layer in fresh.layers.items() if site.startswith(beginning)]
    return [half[fresh.adapter_name].weight for layer in of_layers for half in (layer.lora_A, layer.lora_B)]


def test_trainable_trains_exactly_its_matrices_and_reads_them_out(components):
    with trainable(components, rank=2, alpha=2) as fresh:
        ours = matrices(fresh)
        assert len(ours) == 2 * len(adapted_layers(components))
        trained = {
            id(p) for name in ("text_encoder", "unet") for p in components[name].parameters() if p.requires_grad
        }
        assert trained == {id(parameter) for parameter in ours}
        for parameter in ours:
            parameter.data.add_(0.1)
        learnt, expected = fresh.read(), outputs(components)
        for parameter in ours:
            parameter.data.zero_()
    pack = packs.random_pack(components)
    object.__setattr__(pack, "lora", learnt)
    with merged(components, pack):
        torch.testing.assert_close(outputs(components), expected, rtol=1e-5, atol=1e-5)


def test_trainable_keeps_float32_matrices_on_a_half_precision_model(flat):
    flat["unet"].to(torch.bfloat16)
    with trainable(flat, rank=2, alpha=2) as fresh:
        of_unet = matrices(fresh, "unet.")
        assert {parameter.dtype for parameter in of_unet} == {torch.float32}
        hidden, text = torch.zeros(1, 4, 16, 16).bfloat16(), torch.randn(1, 77, 32).bfloat16()
        flat["unet"](hidden, torch.tensor([1]), text).sample.float().mean().backward()
        assert any(parameter.grad is not None and parameter.grad.any() for parameter in of_unet)


def test_trainable_restores_after_an_error_and_keeps_other_adapters(components):
    inject(components, packs.random_pack(components), "rex", 0.5)
    before, base = state(components), outputs(components)

    def interrupted():
        with trainable(components, rank=2, alpha=2):
            torch.testing.assert_close(outputs(components), base)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert_unchanged(before, components)
    assert torch.equal(outputs(components), base)


def test_trainable_refuses_rank_zero_and_a_second_run_inside(flat):
    with pytest.raises(ConfigurationError, match="at least 1"), trainable(flat, rank=0, alpha=1):
        pass
    with trainable(flat, rank=1, alpha=1) as outer:
        with pytest.raises(ConfigurationError, match="loaded already"), trainable(flat, rank=1, alpha=1):
            pass
        assert outer.read()


@pytest.mark.parametrize("failing", ["fill", "scale"])
def test_an_injection_that_fails_half_way_leaves_no_trace(flat, monkeypatch, failing):
    before, calls = state(flat), []

    def fail(*_arguments, **_named):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt

    if failing == "fill":
        monkeypatch.setattr("diffusers_mixofshow.lora._fill", fail)
    else:
        monkeypatch.setattr(LoraLayer, "set_scale", fail)
    with pytest.raises(KeyboardInterrupt):
        inject(flat, packs.random_pack(flat), "rex")
    assert_unchanged(before, flat)


@pytest.mark.parametrize(("moved", "same"), [(2**-9, True), (2**-7, False)])
def test_an_adapter_is_the_packs_up_to_the_rounding_of_a_cast(flat, moved: float, same: bool):
    """Values may differ by what bfloat16 rounds, relative to the largest one of the matrix."""
    pack = packs.random_pack(flat, "rex", scale=1e-2)
    inject(flat, pack, "rex")
    assert set(find_holders(flat, pack, "rex")) == {"unet", "text_encoder"}
    for model in (flat["unet"], flat["text_encoder"]):
        for half in (value for name, value in model.named_parameters() if ".lora_" in name):
            half.data.view(-1)[0] += moved * half.data.abs().max()
    assert bool(find_holders(flat, pack, "rex")) is same


@pytest.mark.parametrize("size", [1e-4, 3e-6, 1e-6, 1e-8])
def test_small_updates_are_found_in_half_precision(size):
    """Below 6e-5 float16 has fixed steps of 6e-8, so that small numbers are rounded by more than large ones."""
    components = tiny.components()
    components["unet"].half()
    components["text_encoder"].half()
    random = torch.Generator().manual_seed(0)
    lora = {
        site: LowRank(
            down=torch.randn(2, layer.in_features, generator=random),
            up=torch.randn(layer.out_features, 2, generator=random) * size,
            alpha=2.0,
        )
        for site, layer in adapted_layers(components).items()
    }
    pack = EDLoRA(concepts=(), embeddings={}, lora=lora, base_model="tiny", layers=())
    inject(components, pack, "small")
    assert find_holders(components, pack, "small") == {"unet", "text_encoder"}
