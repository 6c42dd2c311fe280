"""`encode_prompt`: the parent's without concepts, layer by layer with them."""

import logging

import pytest
import torch

from diffusers_mixofshow.conditioning.encode import encode
from diffusers_mixofshow.conditioning.tokenize import tokenize
from diffusers_mixofshow.errors import ConceptError, ConfigurationError
from diffusers_mixofshow.families.layers import cross_attention_layers
from diffusers_mixofshow.pipelines import MixOfShowPipeline


@pytest.fixture
def potter(pipe, make_pack):
    """The pipeline with one concept."""
    pipe.load_edlora(make_pack("potter"))
    return pipe


def _encode(pipeline, prompt, *, images=1, guidance=True, negative=None, **given):
    with torch.no_grad():
        return pipeline.encode_prompt(prompt, torch.device("cpu"), images, guidance, negative, **given)


def test_plain_prompts_are_the_parents(potter, parent):
    for arguments in ({}, {"negative": "bad"}, {"images": 3}, {"guidance": False}, {"lora_scale": 0.5}):
        ours, theirs = _encode(potter, "a dog", **arguments), _encode(parent, "a dog", **arguments)
        assert torch.equal(ours[0], theirs[0])
        assert ours[1] is theirs[1] or torch.equal(ours[1], theirs[1])


def test_a_concept_prompt_is_the_layerwise_encoding(potter):
    layers = len(cross_attention_layers(potter.unet))
    positive, negative = _encode(potter, "a <potter>", negative="bad")
    tokenized = tokenize(["a <potter>", "bad"], potter.tokenizer, potter.concepts.values())
    with torch.no_grad():
        expected = encode(potter.text_encoder, tokenized, potter._concept_embeddings, layers).states
    assert positive.shape == negative.shape == (1, layers * 77, 32)
    assert torch.allclose(positive, expected[:1], atol=1e-5)
    assert torch.allclose(negative, expected[1:], atol=1e-5)


def test_a_concept_in_the_negative_prompt_only(potter, parent):
    positive, negative = _encode(potter, "a dog", negative="<potter>")
    plain = _encode(parent, "a dog")[0]
    assert all(torch.allclose(part, plain, atol=1e-5) for part in positive.split(77, dim=1))
    assert not torch.allclose(negative[:, :77], negative[:, 77:154], atol=1e-3)


def test_batches_and_copies(potter):
    prompts = ["a <potter>", "a dog", "<potter1> here"]
    positive, negative = _encode(potter, prompts, images=2, negative=["x", "y", "<potter>"])
    for row, (prompt, unwanted) in enumerate(zip(prompts, ["x", "y", "<potter>"], strict=True)):
        alone = _encode(potter, prompt, negative=unwanted)
        for copy in (2 * row, 2 * row + 1):
            layers = alone[0].shape[1] // 77
            assert torch.allclose(positive[copy], _as_stack(alone[0], positive, layers)[0], atol=1e-5)
            assert torch.allclose(negative[copy], _as_stack(alone[1], positive, layers)[0], atol=1e-5)


def _as_stack(embeds, like, layers):
    return embeds if layers > 1 else embeds.repeat(1, like.shape[1] // 77, 1)


def test_guidance_off_has_no_negative(potter):
    positive, negative = _encode(potter, "a <potter>", guidance=False)
    assert positive.shape[1] > 77
    assert negative is None


def test_given_embeddings_are_passed_on_and_completed(potter):
    positive, negative = _encode(potter, "a <potter>", negative="bad")
    again = _encode(potter, None, prompt_embeds=positive, negative="bad")
    assert torch.equal(again[0], positive)
    assert torch.allclose(again[1], negative, atol=1e-5)
    plain = _encode(potter, "bad", guidance=False)[0]
    completed = _encode(potter, "a <potter>", negative_prompt_embeds=plain)
    assert torch.allclose(completed[1], negative, atol=1e-5)
    with pytest.raises(ConfigurationError, match=r"\(1, 154, 32\)"):
        _encode(potter, "a <potter>", negative_prompt_embeds=plain.repeat(1, 2, 1))


def test_long_prompt_embeddings_without_concepts_pass_like_the_parents(potter, parent):
    long = torch.randn(1, 154, 32)
    given = {"prompt_embeds": long, "negative_prompt_embeds": long}
    assert torch.equal(_encode(potter, None, **given)[0], _encode(parent, None, **given)[0])


def test_the_numbers_of_prompts_must_agree(potter):
    with pytest.raises(ConfigurationError, match="2 negative prompts for 1 prompts"):
        _encode(potter, "a <potter>", negative=["a", "b"])


@pytest.mark.parametrize("where", ["prompt", "negative_prompt"])
def test_an_unknown_placeholder_names_the_nearest(potter, where):
    texts = {"prompt": "a dog", "negative_prompt": "bad", where: "a <poter> and <ron>"}
    with pytest.raises(ConceptError, match=r"<poter> \(did you mean <potter>\?\), <ron>.*Loaded concepts: <potter>"):
        potter(**texts, num_inference_steps=1)


def test_an_unknown_placeholder_is_an_error_without_concepts(pipe):
    with pytest.raises(ConceptError, match="No concept is loaded"):
        pipe("a <potter>", num_inference_steps=1)


def test_textual_inversion_tokens_stay_words(potter, latents):
    width = potter.text_encoder.get_input_embeddings().embedding_dim
    potter.load_textual_inversion(torch.randn(2, width), token="<toy>")
    alone = latents(potter, "a <toy>")
    both = latents(potter, "a <toy> and <potter>")
    assert not torch.equal(alone, both)
    ids = tokenize(potter.maybe_convert_prompt(["a <toy>"], potter.tokenizer), potter.tokenizer, []).ids[0]
    assert {potter.tokenizer.convert_tokens_to_ids(token) for token in ("<toy>", "<toy>_1")} <= set(ids.tolist())


def test_clip_skip_changes_the_prompt_only(potter):
    """diffusers 0.42's own clip_skip fails with transformers >= 5.6; prompts with concepts do not need it."""
    with_skip = _encode(potter, "a <potter>", clip_skip=1)
    without = _encode(potter, "a <potter>")
    assert not torch.allclose(with_skip[0], without[0], atol=1e-3)
    assert torch.equal(with_skip[1], without[1])


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, None])
def test_lora_scale_acts_and_is_taken_back(potter, make_pack, scale):
    potter.set_adapters("potter", 0.8)
    before = _encode(potter, "a <potter>")[0]
    scaled = _encode(potter, "a <potter>", lora_scale=scale)[0]
    assert torch.equal(scaled, before) == (scale in (1.0, None))
    assert torch.equal(_encode(potter, "a <potter>")[0], before)
    if scale == 0:
        potter.unload_edlora()
        potter.load_edlora(make_pack("potter"), scale=0)
        assert torch.allclose(_encode(potter, "a <potter>")[0], scaled, atol=1e-6)


def test_truncation_warns_as_diffusers_does(potter, caplog):
    with caplog.at_level(logging.WARNING):
        _encode(potter, "x" * 75 + " <potter>")
    assert "was truncated because CLIP can only handle sequences up to 77 tokens" in caplog.text


def test_prompts_can_be_encoded_with_gradients(potter):
    positive, _ = potter.encode_prompt("a <potter>", torch.device("cpu"), 1, False)
    assert positive.requires_grad


def test_encoding_and_drawing_may_be_two_pipelines(potter, components, make_pack, latents):
    """As one does when memory is short: first only the text models, then only the rest."""
    expected = latents(potter, "a <potter>", negative_prompt="bad")
    potter.unload_edlora()
    kinds = ("text_encoder", "tokenizer")
    only_text = {name: part if name in kinds else None for name, part in components.items()}
    no_text = {name: None if name in kinds else part for name, part in components.items()}
    texts = MixOfShowPipeline(**only_text, requires_safety_checker=False)
    texts.load_edlora(make_pack("potter"))
    positive, negative = _encode(texts, "a <potter>", negative="bad")
    pictures = MixOfShowPipeline(**no_text, requires_safety_checker=False)
    pictures.load_edlora(make_pack("potter"))
    given = {"prompt_embeds": positive, "negative_prompt_embeds": negative}
    assert torch.allclose(latents(pictures, **given), expected, atol=1e-5)


def test_what_is_no_text_gets_the_parents_error(potter):
    with pytest.raises(ValueError, match="has to be of type `str` or `list`"):
        potter(("a <potter>",))
