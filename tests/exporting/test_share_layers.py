"""A layer-wise concept becomes one that other programs draw: what they see of it, and what it leaves as it was."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline

import packs
import tiny
from diffusers_mixofshow import toyland
from diffusers_mixofshow.concepts import Concept
from diffusers_mixofshow.conditioning.attention import layerwise_attention
from diffusers_mixofshow.edlora import EDLoRA
from diffusers_mixofshow.errors import ConfigurationError, EDLoRAFormatError, FusionError
from diffusers_mixofshow.exporting import share_layers
from diffusers_mixofshow.exporting.shared import RANK_OF_A_CONCEPT
from diffusers_mixofshow.families.layers import cross_attention_layers
from diffusers_mixofshow.interop import convert
from diffusers_mixofshow.interop.textual_inversion import is_layerwise, mean_over_layers
from diffusers_mixofshow.pipelines import MixOfShowPipeline


@pytest.fixture(scope="module")
def pipe() -> StableDiffusionPipeline:
    return StableDiffusionPipeline(**tiny.components(), requires_safety_checker=False)


def keys_and_values(pack: EDLoRA) -> set[str]:
    return {f"unet.{layer}.{half}" for layer in pack.layers for half in ("to_k", "to_v")}


def weights_of(pipe) -> dict[str, torch.Tensor]:
    models = ("unet", "text_encoder")
    return {
        f"{name}.{key}": value.clone() for name in models for key, value in getattr(pipe, name).state_dict().items()
    }


def test_tokens_have_their_means_and_keys_and_values_the_rest(pipe):
    pack = packs.random_pack(pipe.components, "rex", ranks=(2, 4), alphas=(4.0, 1.0))
    before = weights_of(pipe)
    shared = share_layers(pipe, pack)
    assert all(torch.equal(value, before[name]) for name, value in weights_of(pipe).items())
    assert not is_layerwise(shared)
    for token, rows in pack.embeddings.items():
        assert torch.equal(shared.embeddings[token], mean_over_layers(rows).expand_as(rows))
    assert shared.lora.keys() == pack.lora.keys()
    for site, update in pack.lora.items():
        gained = RANK_OF_A_CONCEPT if site in keys_and_values(pack) else 0
        assert shared.lora[site].rank == update.rank + gained
        if not gained:
            assert shared.lora[site] is update
    assert 0 < shared.training["shared_layers_kept"] < 1
    assert {key: value for key, value in shared.training.items() if key in pack.training} == dict(pack.training)


@pytest.mark.parametrize("change", ["two concepts", "no LoRA", "float16", "some layers"])
def test_whatever_a_pack_holds(change: str):
    pipe = StableDiffusionPipeline(**tiny.components(), requires_safety_checker=False)
    names = ("rex", "kit") if change == "two concepts" else ("rex",)
    dtype = torch.float16 if change == "float16" else torch.float32
    pack = packs.random_pack(pipe.components, *names, dtype=dtype)
    if change == "no LoRA":
        pack = replace(pack, lora={})
    if change == "some layers":
        some = {site: update for site, update in pack.lora.items() if site.endswith(("to_q", "to_k"))}
        pack = replace(pack, lora=some)
    shared = share_layers(pipe, pack)
    assert keys_and_values(pack) <= shared.lora.keys()
    own = pack.lora[site].rank if (site := sorted(keys_and_values(pack))[0]) in pack.lora else 0
    assert shared.lora[site].rank == own + RANK_OF_A_CONCEPT * len(names)
    assert {half.dtype for update in shared.lora.values() for half in (update.down, update.up)} == {dtype}
    shared.check_fits(pipe.components)


def test_prompts_with_the_class_word_are_what_the_new_updates_spare(pipe, monkeypatch: pytest.MonkeyPatch):
    """They are encoded beside those that name the concept, and captions of other things."""
    pack = packs.random_pack(pipe.components, "rex")
    encode, seen = pipe.text_encoder.forward, set()

    def note(input_ids: torch.Tensor, *others, **more):
        seen.update(tuple(row) for row in input_ids.tolist())
        return encode(input_ids, *others, **more)

    monkeypatch.setattr(pipe.text_encoder, "forward", note)
    share_layers(pipe, pack, prompts=["a <TOK>, ink", "ink of a <TOK>"])
    (concept,) = pack.concepts
    for prompt in (f"a {concept.class_word}, ink", f"ink of a {concept.class_word}"):
        assert tuple(pipe.tokenizer(prompt, padding="max_length").input_ids) in seen


def test_equal_embeddings_are_returned_as_they_are(pipe):
    pack = packs.random_pack(pipe.components, "rex")
    equal = {token: rows[:1].expand_as(rows).contiguous() for token, rows in pack.embeddings.items()}
    pack = replace(pack, embeddings=equal)
    assert share_layers(pipe, pack) is pack


def test_another_base_and_a_nameless_prompt_are_refused(pipe):
    pack = packs.random_pack(pipe.components, "rex")
    with pytest.raises(EDLoRAFormatError):
        share_layers(toyland.load_pipeline(), pack)
    with pytest.raises(FusionError, match="without the concept"):
        share_layers(pipe, pack, prompts=["a photo"])


@pytest.mark.parametrize("scale", [1.0, 0.5, 0.0])
def test_what_the_pipeline_has_loaded_changes_nothing(scale: float):
    parts = tiny.components()
    pipe = MixOfShowPipeline(**parts, requires_safety_checker=False)
    pack, other = (packs.random_pack(parts, name) for name in ("rex", "kit"))
    expected = share_layers(pipe, pack)
    pipe.load_edlora(pack, scale)
    pipe.load_edlora(other, adapter_name="other")
    found = share_layers(pipe, pack)
    assert found.training == expected.training
    for site, update in expected.lora.items():
        assert torch.equal(found.lora[site].down, update.down)
        assert torch.equal(found.lora[site].up, update.up)
    assert set(pipe.concepts) == {"<rex>", "<kit>"}


@pytest.mark.parametrize("fused", [False, True])
def test_adapters_of_others_are_refused_where_they_act(fused: bool, tmp_path: Path):
    parts = tiny.components()
    pack = packs.random_pack(parts, "rex")
    (lora, *_) = convert(pack, tmp_path, "diffusers").files
    plain = StableDiffusionPipeline(**parts, requires_safety_checker=False)
    expected = share_layers(plain, pack)
    plain.load_lora_weights(str(lora), adapter_name="theirs")
    if fused:
        plain.fuse_lora()
    for pipe in (plain, MixOfShowPipeline(**plain.components, requires_safety_checker=False)):
        with pytest.raises(ConfigurationError, match="theirs"):
            share_layers(pipe, pack)
    if fused:
        plain.disable_lora()  # its updates stay in the weights
        with pytest.raises(ConfigurationError, match="theirs"):
            share_layers(plain, pack)
        plain.enable_lora()
        plain.unfuse_lora()
    plain.disable_lora()
    found = share_layers(plain, pack)
    assert all(torch.allclose(found.lora[site].up, update.up, atol=1e-5) for site, update in expected.lora.items())


WORDS = ("blue", "cat", "yellow", "vase", "green", "dog", "pink")
"""Each layer of the concept below is told something else."""


@pytest.fixture(scope="module")
def motley() -> EDLoRA:
    """A concept of Toyland without any update, as different between layers as words are."""
    pipe = toyland.load_pipeline()
    table, words = pipe.text_encoder.get_input_embeddings().weight.detach(), iter(WORDS * 2)
    concept = Concept.from_name("motley", "critter", kind="character")
    layers = cross_attention_layers(pipe.unet)
    rows = {
        token: torch.stack([table[pipe.tokenizer(next(words)).input_ids[1]] for _ in layers])
        for token in concept.tokens
    }
    return EDLoRA(concepts=(concept,), embeddings=rows, lora={}, base_model="toyland", layers=layers)


def noise(pipe, prompt: str) -> torch.Tensor:
    """What the U-Net predicts for a prompt, on one latent, at one time."""
    states = pipe.encode_prompt(prompt, "cpu", 1, False)[0]
    config, generator = pipe.unet.config, torch.Generator().manual_seed(0)
    latents = torch.randn(2, config.in_channels, config.sample_size, config.sample_size, generator=generator)
    with torch.no_grad(), layerwise_attention(pipe.unet):
        return pipe.unet(latents, 600, encoder_hidden_states=states.expand(2, -1, -1)).sample


def noise_in_stock_diffusers(folder: Path, prompt: str) -> torch.Tensor:
    pipe = toyland.load_pipeline()
    lora, embedding, _ = sorted(folder.rglob("*.*"), key=lambda path: (path.suffix == ".txt", len(path.parts)))
    pipe.load_lora_weights(str(lora))
    pipe.load_textual_inversion(str(embedding), token="<motley>")
    return noise(pipe, prompt)


@pytest.mark.parametrize("to", ["kohya", "diffusers"])
def test_stock_diffusers_draws_nearly_the_same(tmp_path: Path, motley: EDLoRA, to: str):
    prompt = "a photo of a <motley> on the beach"
    pipe = toyland.load_pipeline(pipeline_class=MixOfShowPipeline)
    shared = share_layers(pipe, motley)
    mean = replace(shared, lora={site: replace(update, up=0 * update.up) for site, update in shared.lora.items()})
    pipe.load_edlora(motley)
    own = noise(pipe, prompt)
    misses = {}
    for name, pack in (("shared", shared), ("mean", mean)):
        convert(pack, tmp_path / name, to)
        misses[name] = float((noise_in_stock_diffusers(tmp_path / name, prompt) - own).norm() / own.norm())
    assert misses["shared"] < 0.5 * misses["mean"]


def test_prompts_without_the_concept_hardly_change(motley: EDLoRA):
    pipe = toyland.load_pipeline(pipeline_class=MixOfShowPipeline)
    shared = share_layers(pipe, motley)
    plain, named = "a brown dog in the snow", "a photo of a <motley> on the beach"
    before = noise(pipe, plain)
    pipe.load_edlora(motley)
    effect = float((noise(pipe, named) - noise(pipe, "a photo of a critter on the beach")).norm())
    pipe.unload_edlora()
    pipe.load_edlora(shared)
    assert float((noise(pipe, plain) - before).norm()) < 0.2 * effect


def test_it_tells_how_far_it_is_and_whoever_switches_bars_off_hears_nothing(pipe, capsys, monkeypatch):
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    pack, prompts = packs.random_pack(pipe.components, "rex", ranks=(2,)), ("a <TOK>", "two <TOK>")
    share_layers(pipe, pack, prompts)
    done, total = re.findall(r"Sharing layers: (\d+)/(\d+)", capsys.readouterr().err)[-1]
    assert done == total
    assert int(total) > 3 * len(prompts) + len(pack.layers)
    pipe.set_progress_bar_config(disable=True)
    share_layers(pipe, pack, prompts)
    assert capsys.readouterr().err == ""
    pipe.set_progress_bar_config(disable=False)
