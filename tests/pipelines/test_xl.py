"""Stable Diffusion XL: its parent without regions and concepts, and what two text encoders and one vector change."""

import inspect

import accelerate
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLImg2ImgPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.callbacks import SDXLCFGCutoffCallback
from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0
from diffusers.models.embeddings import ImageProjection, MultiIPAdapterImageProjection
from PIL import Image
from safetensors.torch import save_file

from diffusers_mixofshow import (
    Draft,
    Isolation,
    MixOfShowXLImg2ImgPipeline,
    MixOfShowXLPipeline,
    Refinement,
    Region,
    refine_regions,
)
from diffusers_mixofshow.errors import ConceptError, ConfigurationError, MixOfShowWarning
from diffusers_mixofshow.families.layers import cross_attention_layers
from families.pipelines import tiny_pipeline


LEFT, RIGHT = (0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0)
SETTINGS = {"num_inference_steps": 2, "output_type": "latent", "height": 32, "width": 32}
WIDTH, PROJECTED = 32 + 48, 40


@pytest.fixture
def parent():
    pipeline = tiny_pipeline("Stable Diffusion XL")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def pipe(parent):
    pipeline = MixOfShowXLPipeline(**parent.components, add_watermarker=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def regions():
    return [Region("a cat", box=LEFT, negative_prompt="beard"), Region("a dog", box=(0.4, 0.2, 1, 0.8))]


def rows(count, width=WIDTH, seed=1):
    return torch.randn(1, count, width, generator=torch.Generator().manual_seed(seed))


def vector(seed=1):
    return torch.randn(1, PROJECTED, generator=torch.Generator().manual_seed(seed))


GIVEN = {
    "prompt_embeds": rows(90, seed=1),
    "negative_prompt_embeds": rows(90, seed=2),
    "pooled_prompt_embeds": vector(3),
    "negative_pooled_prompt_embeds": vector(4),
}
SIZES = {"original_size": (64, 48), "crops_coords_top_left": (8, 4), "target_size": (40, 24)}
CALLS = [
    {},
    {"negative_prompt": "bad"},
    {"negative_prompt": ""},
    {"prompt_2": "in oil"},
    {"negative_prompt": "bad", "negative_prompt_2": "worse"},
    {"negative_prompt_2": "worse"},
    {"guidance_scale": 1.0},
    {"guidance_rescale": 0.7},
    {"num_images_per_prompt": 2},
    {"prompt": ["a dog", "a cat"], "negative_prompt": ["x", "y"]},
    {"height": 48, "width": 16},
    {"clip_skip": 1},
    {"cross_attention_kwargs": {"scale": 0.5}},
    SIZES,
    SIZES | {f"negative_{name}": value for name, value in SIZES.items()},
    {"denoising_end": 0.5},
    {"prompt": None, **GIVEN},
    {"pooled_prompt_embeds": vector()},
]


@pytest.mark.parametrize("arguments", CALLS, ids=lambda arguments: ",".join(arguments) or "nothing")
def test_without_concepts_and_regions_it_is_its_parent(pipe, parent, latents, arguments):
    arguments = {"prompt": "a dog", **arguments}
    expected = latents(parent, **arguments)
    assert torch.equal(latents(pipe, **arguments), expected)
    assert torch.equal(latents(pipe, regions=[], **arguments), expected)


def test_its_signature_and_parts_are_the_parents_and_regions(pipe, parent):
    theirs = inspect.signature(StableDiffusionXLPipeline.__call__).parameters
    ours = inspect.signature(MixOfShowXLPipeline.__call__).parameters
    assert [name for name in ours if name not in ("regions", "isolation", "draft", "refine")] == list(theirs)
    assert all(ours[name].default == theirs[name].default for name in theirs)
    encoding = inspect.signature(StableDiffusionXLPipeline.encode_prompt).parameters
    assert list(inspect.signature(pipe.encode_prompt).parameters) == [name for name in encoding if name != "self"]
    assert pipe.components.keys() == parent.components.keys()
    assert pipe.config.force_zeros_for_empty_prompt == parent.config.force_zeros_for_empty_prompt


@pytest.mark.parametrize("forced", [True, False], ids=["zeros for no prompt", "the empty prompt"])
def test_a_full_region_is_the_prompt_where_the_vector_is_the_same(parent, latents, forced):
    pipe = MixOfShowXLPipeline(**parent.components, add_watermarker=False, force_zeros_for_empty_prompt=forced)
    everywhere = [Region("a cat", box=(0, 0, 1, 1))]
    expected = latents(pipe, "a cat")
    of_cat = pipe.encode_prompt("a cat")[2]
    given = {"pooled_prompt_embeds": of_cat, "regions": everywhere}
    assert not torch.allclose(latents(pipe, "a dog", **given | {"regions": None}), expected, atol=1e-4)
    assert torch.allclose(latents(pipe, "a dog", **given), expected, atol=1e-5)
    assert torch.allclose(latents(pipe, "a cat", regions=everywhere), expected, atol=1e-5)
    assert not torch.allclose(latents(pipe, "a dog", regions=everywhere), expected, atol=1e-6)


def test_each_part_of_a_region_matters(pipe, latents):
    def run(negative="bad", **changes):
        region = {"prompt": "a cat", "box": LEFT, "negative_prompt": "beard", **changes}
        return latents(pipe, "two people", negative_prompt=negative, regions=[Region(**region)])

    pictures = [
        run(),
        run(prompt="a dog"),
        run(box=RIGHT),
        run(negative_prompt="hat"),
        run(negative_prompt=None),
        run(negative_prompt=None, negative=None),
        run(guidance_scale=2.0),
        run(end=0.5),
        latents(pipe, "two people", negative_prompt="bad"),
    ]
    for i, one in enumerate(pictures):
        assert not any(torch.allclose(one, other, atol=1e-5) for other in pictures[:i]), i


def test_regions_of_the_global_prompt_change_nothing(pipe, latents):
    same = [Region("a cat", box=LEFT), Region("a cat", box=(0.3, 0.1, 0.9, 0.6))]
    for arguments in ({}, {"negative_prompt": "bad"}, {"clip_skip": 1}, {"negative_prompt": "a", **SIZES}):
        expected = latents(pipe, "a cat", **arguments)
        assert torch.allclose(latents(pipe, "a cat", regions=same, **arguments), expected, atol=1e-4)


def test_what_the_second_encoder_alone_reads_is_its_own(pipe, latents):
    """`prompt_2` stays the global prompt's; regions are read by both encoders."""
    plain = latents(pipe, "a cat", prompt_2="in oil")
    assert not torch.allclose(latents(pipe, "a cat", regions=[Region("a cat", box=LEFT)], prompt_2="in oil"), plain)
    never = [Region("a dog", box=(0, 0, 1, 1), end=0.2)]
    with pytest.warns(MixOfShowWarning, match="never holds"):
        unchanged = latents(pipe, "a cat", regions=never, prompt_2="in oil")
    assert torch.allclose(unchanged, plain, atol=1e-4)


def test_batches_are_loops(pipe, latents):
    prompts, negatives = ["a dog", "two cats", "a fox"], ["x", "y", "z"]
    noise = torch.randn(3, 4, 16, 16, generator=torch.Generator().manual_seed(3))
    together = latents(pipe, prompts, negative_prompt=negatives, latents=noise, regions=regions())
    for row, prompt in enumerate(prompts):
        alone = latents(pipe, prompt, negative_prompt=negatives[row], latents=noise[row : row + 1], regions=regions())
        assert (together[row] - alone[0]).norm() < 1e-5 * alone.norm()
    noise = noise[:1].repeat(2, 1, 1, 1)
    twice = latents(pipe, "two cats", latents=noise, num_images_per_prompt=2, regions=regions())
    alone = latents(pipe, "two cats", latents=noise[:1], regions=regions())
    assert (twice - alone).norm() < 1e-5 * twice.norm()


def test_given_embeddings_do_the_prompts_work(pipe, latents):
    expected = latents(pipe, "a cat", negative_prompt="bad", regions=regions())
    names = "prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds"
    given = dict(zip(names, pipe.encode_prompt("a cat", negative_prompt="bad"), strict=True))
    assert torch.allclose(latents(pipe, regions=regions(), **given), expected, atol=1e-5)
    stacked = {name: each.repeat(1, 4, 1) if name.endswith("prompt_embeds") and each.ndim == 3 else each
               for name, each in given.items()}  # fmt: skip
    assert torch.allclose(latents(pipe, regions=regions(), **stacked), expected, atol=1e-5)
    assert torch.allclose(latents(pipe, **stacked), latents(pipe, "a cat", negative_prompt="bad"), atol=1e-4)


def test_callbacks_see_the_parents_tensors_and_guidance_may_stop(pipe, latents):
    wanted = ["add_text_embeds", "add_time_ids", "latents", "prompt_embeds"]
    seen = []

    def callback(pipeline, step, _timestep, tensors):
        seen.append((pipeline is pipe, step, sorted(tensors)))
        return tensors

    given = {"callback_on_step_end": callback, "callback_on_step_end_tensor_inputs": wanted}
    whole = latents(pipe, "a cat", regions=regions(), **given)
    assert seen == [(True, 0, wanted), (True, 1, wanted)]
    stopped = SDXLCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=0)
    assert not torch.equal(latents(pipe, "a cat", regions=regions(), callback_on_step_end=stopped), whole)


def test_nothing_stays_after_an_error(pipe, latents):
    def fail(*_):
        raise KeyboardInterrupt

    processors = dict(pipe.unet.attn_processors)
    plain = latents(pipe, "a cat")
    with pytest.raises(KeyboardInterrupt):
        latents(pipe, "a cat", regions=regions(), callback_on_step_end=fail)
    assert all(pipe.unet.attn_processors[name] is each for name, each in processors.items())
    assert torch.equal(latents(pipe, "a cat"), plain)


@pytest.mark.parametrize("name", ["prompt", "prompt_2", "negative_prompt", "negative_prompt_2"])
def test_unknown_words_are_told_wherever_they_stand(pipe, latents, name):
    with pytest.raises(ConceptError, match="<ron>"):
        latents(pipe, **{"prompt": "a cat", "negative_prompt": "bad", name: "a <ron>"})


def test_a_word_that_one_tokenizer_knows_is_no_mistake(pipe, latents):
    """A textual inversion may be loaded for one text encoder alone."""
    pipe.tokenizer_2.add_tokens("<fur>")
    pipe.text_encoder_2.resize_token_embeddings(len(pipe.tokenizer_2))
    found = latents(pipe, "a cat", regions=[Region("a <fur> dog", box=LEFT)])
    assert not torch.equal(found, latents(pipe, "a cat", regions=[Region("a dog", box=LEFT)]))


@pytest.mark.parametrize("extra", [{}, {"original_size": (90, 70), "crops_coords_top_left": (3, 5)}])
def test_drafts_are_told_their_own_size(pipe, latents, extra):
    """A draft is a picture of its region alone: its size is the target's, whatever the call draws."""
    told = []

    def note(_unet, _inputs, named):
        told.append((tuple(named["sample"].shape if "sample" in named else _inputs[0].shape),
                     named["added_cond_kwargs"]["time_ids"].tolist()))  # fmt: skip

    hook = pipe.unet.register_forward_pre_hook(note, with_kwargs=True)
    half = [Region("a cat", box=LEFT)]
    settings = {"num_inference_steps": 4, "height": 32, "width": 64, **extra}
    drafted = latents(pipe, "x", regions=half, draft=Draft(), **settings)
    hook.remove()
    own = [(shape, ids) for shape, ids in told if shape[2:] != (16, 32)]
    assert own
    for shape, ids in own:
        size = [2.0 * shape[2], 2.0 * shape[3]]
        wanted = [*map(float, extra["original_size"]), 3.0, 5.0, *size] if extra else [*size, 0.0, 0.0, *size]
        assert ids == [wanted] * shape[0]
    assert not torch.equal(drafted, latents(pipe, "x", regions=half, **settings))


def avoided_by_drafts(pipe, latents, **negatives):
    """Texts and vectors that drafts of two regions avoid, the second one told to avoid a beard."""
    seen = []

    def note(_unet, inputs, named):
        if inputs[0].shape[2:] != (16, 32):
            seen.append((named["encoder_hidden_states"], named["added_cond_kwargs"]["text_embeds"]))

    hook = pipe.unet.register_forward_pre_hook(note, with_kwargs=True)
    both = [Region("a cat", box=LEFT), Region("a dog", box=RIGHT, negative_prompt="beard")]
    settings = {"num_inference_steps": 4, "height": 32, "width": 64, "regions": both, "draft": Draft()}
    latents(pipe, ["x"], **negatives, **settings)
    hook.remove()
    return seen[0]


@pytest.mark.parametrize("negative", [None, "bad"])
def test_a_draft_avoids_what_its_region_or_the_call_says(pipe, latents, negative):
    """Without any negative prompt the text to avoid is zeros, as the parent's, and so is its vector."""
    texts, vectors = avoided_by_drafts(pipe, latents, negative_prompt=negative)
    for row, text in enumerate((negative, "beard")):
        expected = pipe.encode_prompt("a cat", negative_prompt=text)
        assert torch.allclose(texts[row], expected[1][0], atol=1e-5)
        assert torch.allclose(vectors[row], expected[3][0], atol=1e-5)


def test_drafts_avoid_what_the_second_encoder_alone_is_told_to(pipe, latents):
    """A region's own negative prompt is read by both encoders, the call's by the one that it is given for."""
    texts, vectors = avoided_by_drafts(pipe, latents, negative_prompt="bad", negative_prompt_2=["worse"])
    for row, (first, second) in enumerate((("bad", "worse"), ("beard", "beard"))):
        expected = pipe.encode_prompt("a cat", negative_prompt=first, negative_prompt_2=second)
        assert torch.allclose(texts[row], expected[1][0], atol=1e-5)
        assert torch.allclose(vectors[row], expected[3][0], atol=1e-5)


@pytest.mark.parametrize("argument", [{"draft": Draft()}, {"refine": Refinement()}], ids=["drafts", "refining"])
def test_negative_embeddings_with_their_vector_are_avoided_as_their_text_is(pipe, argument):
    _, negative, _, vector = pipe.encode_prompt("a cat", negative_prompt="bad", negative_prompt_2="worse")
    both = [Region("a cat", box=(0, 0, 0.3, 0.3)), Region("a dog", box=(0.6, 0.6, 1, 1), negative_prompt="beard")]
    settings = {"num_inference_steps": 4, "height": 64, "width": 64, "guidance_scale": 30.0}
    settings |= {"regions": both, **argument}

    def drawn(**negatives):
        generator = torch.Generator().manual_seed(0)
        return np.asarray(pipe("x", generator=generator, **settings, **negatives).images[0]).astype(int)

    expected = drawn(negative_prompt="bad", negative_prompt_2="worse")
    found = drawn(negative_prompt_embeds=negative, negative_pooled_prompt_embeds=vector)
    assert np.abs(found - expected).max() <= 1
    assert np.abs(drawn(negative_prompt="bad") - expected).max() > 1


def test_regions_drawn_anew_avoid_what_the_second_encoder_alone_is_told_to(pipe):
    picture = Image.effect_noise((64, 64), 80).convert("RGB")
    plain, own = (
        Region("a cat", box=(0.1, 0.1, 0.3, 0.3)),
        Region("a cat", box=(0.1, 0.1, 0.3, 0.3), negative_prompt="x"),
    )

    def drawn(region, **settings):
        generator = torch.Generator().manual_seed(0)
        given = {"generator": generator, "num_inference_steps": 4, **settings}
        return list(refine_regions(pipe, [picture], [region], **given)[0].getdata())

    both = drawn(plain, negative_prompt="y", negative_prompt_2="z")
    assert both != drawn(plain, negative_prompt="y")
    assert both == drawn(plain, negative_prompt=["y"], negative_prompt_2=["z"])
    assert drawn(plain, negative_prompt="y", negative_prompt_2="y") == drawn(plain, negative_prompt="y")
    assert drawn(own, negative_prompt="y", negative_prompt_2="z") == drawn(own)
    assert drawn(plain, negative_prompt_2="z") == drawn(plain)  # as the parent, which takes zeros then


def test_a_call_refines_with_what_each_encoder_is_told_to_avoid(pipe, monkeypatch):
    given = {}

    def note(_pipe, images, _regions, **settings):
        given.update(settings)
        return images

    monkeypatch.setattr("diffusers_mixofshow.pipelines.refining.refine_regions", note)
    settings = {"num_inference_steps": 1, "height": 32, "width": 32, "regions": [Region("a cat", box=LEFT)]}
    for texts, wanted in [
        ({"negative_prompt": "y", "negative_prompt_2": "z"}, (["y", "y"], ["z", "z"])),
        ({"negative_prompt": ["y", "x"]}, (["y", "x"], ["y", "x"])),
        ({"negative_prompt_2": "z"}, ([None, None], [None, None])),
    ]:
        pipe(["a", "b"], refine=Refinement(), **settings, **texts)
        assert (given["negative_prompt"], given["negative_prompt_2"]) == wanted


def test_everything_together_draws_a_picture(pipe):
    settings = {"num_inference_steps": 4, "height": 32, "width": 64, "generator": torch.Generator().manual_seed(0)}
    drawn = pipe("two", regions=regions(), draft=Draft(), refine=Refinement(), isolation=Isolation(), **settings)
    assert drawn.images[0].size == (64, 32)


def test_regions_are_drawn_anew_by_both_encoders_with_or_without_anything_to_avoid(pipe):
    """Drawn anew without strength of change the picture stays nearly as it was; a region's text matters otherwise."""
    picture = Image.effect_noise((64, 64), 80).convert("RGB")

    def drawn(*own, **settings):
        generator = torch.Generator().manual_seed(0)
        return list(
            refine_regions(pipe, [picture], own, generator=generator, num_inference_steps=4, **settings)[0].getdata()
        )

    small = (0.1, 0.1, 0.3, 0.3)
    results = [
        drawn(Region("a cat", box=small)),
        drawn(Region("a dog", box=small)),
        drawn(Region("a cat", box=small, negative_prompt="x")),
        drawn(Region("a cat", box=small), negative_prompt="y"),
        drawn(Region("a cat", box=small), negative_prompt=""),
    ]
    assert all(one != other for i, one in enumerate(results) for other in results[:i])
    mixed = drawn(Region("a cat", box=small), Region("a fox", box=(0.6, 0.6, 0.8, 0.8), negative_prompt="x"))
    assert mixed != results[0]


def test_it_is_made_of_another_pipeline_and_saved_and_loaded(pipe, parent, latents, tmp_path):
    expected = latents(pipe, "a dog", regions=regions())
    again = MixOfShowXLPipeline.from_pipe(parent)
    again.set_progress_bar_config(disable=True)
    assert torch.equal(latents(again, "a dog", regions=regions()), expected)
    pipe.save_pretrained(tmp_path)
    for kind in (MixOfShowXLPipeline, StableDiffusionXLPipeline):
        loaded = kind.from_pretrained(tmp_path)
        loaded.set_progress_bar_config(disable=True)
        torch.testing.assert_close(latents(loaded, "a dog"), latents(pipe, "a dog"), rtol=1e-4, atol=1e-3)
    loaded = MixOfShowXLPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    torch.testing.assert_close(latents(loaded, "a dog", regions=regions()), expected, rtol=1e-4, atol=1e-3)


def test_plain_loras_load_as_in_the_parent(pipe, parent, latents, tmp_path):
    random = torch.Generator().manual_seed(0)
    layers = {
        "unet.mid_block.attentions.0.transformer_blocks.1.attn2.to_k": (80, 64),
        "text_encoder.text_model.encoder.layers.0.self_attn.q_proj": (32, 32),
        "text_encoder_2.text_model.encoder.layers.0.self_attn.q_proj": (48, 48),
    }
    state = {}
    for site, (entering, leaving) in layers.items():
        state[f"{site}.lora_A.weight"] = torch.randn(2, entering, generator=random)
        state[f"{site}.lora_B.weight"] = torch.randn(leaving, 2, generator=random)
    before = latents(parent, "a dog")
    pipe.load_lora_weights(dict(state), adapter_name="style")
    styled = latents(pipe, "a dog")
    assert not torch.allclose(styled, before, atol=1e-4)
    assert torch.equal(latents(parent, "a dog"), styled)  # they share their models
    in_regions = latents(pipe, "a dog", regions=regions())
    scaled = latents(pipe, "a dog", regions=regions(), cross_attention_kwargs={"scale": 0.5})
    assert not torch.allclose(in_regions, scaled, atol=1e-5)
    assert torch.equal(latents(pipe, "a dog", regions=regions()), in_regions)
    pipe.unload_lora_weights()
    assert torch.equal(latents(pipe, "a dog"), before)


def test_texts_for_the_second_encoder_are_as_many_as_prompts(pipe, latents):
    for name in ("prompt_2", "negative_prompt", "negative_prompt_2"):
        given = {"negative_prompt": ["x", "y"], name: ["one"]}
        with pytest.raises(ConfigurationError, match=f"Got 1 {name.replace('_', ' ')}s for 2 prompts"):
            latents(pipe, ["a", "b"], regions=regions(), **given)


def test_embeddings_of_another_length_are_refused_with_regions_and_those_without_a_vector_by_the_parent(pipe, latents):
    with pytest.raises(ConfigurationError, match="expected 77 tokens, or 4 layers of 77"):
        latents(pipe, regions=regions(), **GIVEN)
    given = {name: each for name, each in GIVEN.items() if "pooled" not in name}
    with pytest.raises(ValueError, match="pooled_prompt_embeds"):
        latents(pipe, regions=regions(), **given)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_on_the_cpu(pipe, latents, dtype):
    expected = latents(pipe, "a cat", regions=regions())
    pipe.to(dtype=dtype)
    result = latents(pipe, "a cat", regions=regions())
    assert result.dtype == dtype
    assert torch.nn.functional.cosine_similarity(result.float().flatten(), expected.flatten(), dim=0) > 0.99


def test_models_may_come_and_go_and_weights_be_away_between_calls(pipe, latents):
    """What offloading does, with the CPU as the device to run on."""
    expected = latents(pipe, "a cat", regions=regions())
    hook, hooks = None, []
    for name in ("text_encoder", "text_encoder_2", "unet"):
        _, hook = accelerate.cpu_offload_with_hook(getattr(pipe, name), torch.device("cpu"), prev_module_hook=hook)
        hooks.append(hook)
    assert torch.equal(latents(pipe, "a cat", regions=regions()), expected)
    for hook in hooks:
        hook.remove()
    for name in ("text_encoder", "text_encoder_2", "unet", "vae"):
        accelerate.cpu_offload(getattr(pipe, name), torch.device("cpu"), offload_buffers=True)
    assert next(pipe.text_encoder_2.parameters()).is_meta
    assert torch.allclose(latents(pipe, "a cat", regions=regions()), expected, atol=1e-3)


def test_ip_adapters_keep_working_beside_regions(pipe, latents):
    torch.manual_seed(0)
    for path in cross_attention_layers(pipe.unet):
        layer = pipe.unet.get_submodule(path)
        layer.set_processor(IPAdapterAttnProcessor2_0(layer.inner_dim, WIDTH, num_tokens=(4,), scale=1.0))
    projection = ImageProjection(image_embed_dim=8, cross_attention_dim=WIDTH, num_image_text_embeds=4)
    pipe.unet.encoder_hid_proj = MultiIPAdapterImageProjection([projection])
    pipe.unet.config.encoder_hid_dim_type = "ip_image_proj"
    given = {"ip_adapter_image_embeds": [3 * torch.randn(2, 1, 8, generator=torch.Generator().manual_seed(0))]}
    both = [Region("a cat", box=(0, 0, 0.4, 1)), Region("a cat", box=(0.3, 0, 1, 1))]
    alone = latents(pipe, "a cat", **given)
    assert torch.allclose(latents(pipe, "a cat", regions=both, **given), alone, atol=1e-3)
    other = [3 * torch.randn(2, 1, 8, generator=torch.Generator().manual_seed(1))]
    assert not torch.allclose(latents(pipe, "a cat", ip_adapter_image_embeds=other), alone, atol=1e-2)


def test_the_refiner_is_its_parent_and_draws_regions_by_its_one_encoder():
    parts = dict(tiny_pipeline("Stable Diffusion XL").components)
    sizes = {"cross_attention_dim": 48, "projection_class_embeddings_input_dim": 40 + 5 * 8}
    torch.manual_seed(0)
    unet = UNet2DConditionModel.from_config({**parts["unet"].config, **sizes}).eval()
    parts |= {"unet": unet, "text_encoder": None, "tokenizer": None}
    settings = {"requires_aesthetics_score": True, "add_watermarker": False}
    picture = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))

    def drawn(kind, **given):
        pipeline = kind(**parts, **settings)
        pipeline.set_progress_bar_config(disable=True)
        call = {"image": picture, "num_inference_steps": 4, "strength": 0.6, "output_type": "latent", "prompt": "x"}
        return pipeline(generator=torch.Generator().manual_seed(0), **call | given).images

    for given in ({}, {"prompt_2": "y"}, {"aesthetic_score": 3.0, "negative_prompt": "bad"}):
        expected = drawn(StableDiffusionXLImg2ImgPipeline, **given)
        assert torch.equal(drawn(MixOfShowXLImg2ImgPipeline, **given), expected)
        everywhere = [Region("x", box=(0, 0, 1, 1))]
        assert torch.allclose(drawn(MixOfShowXLImg2ImgPipeline, regions=everywhere, **given), expected, atol=1e-4)
    half = [Region("a cat", box=LEFT)]
    assert not torch.allclose(drawn(MixOfShowXLImg2ImgPipeline, regions=half), drawn(MixOfShowXLImg2ImgPipeline))


def test_a_picture_may_be_begun_by_one_pipeline_and_ended_by_another(pipe, latents):
    """An ensemble of denoisers, here of the same parts: nearly the picture that one draws alone."""
    ending = MixOfShowXLImg2ImgPipeline.from_pipe(pipe)
    ending.set_progress_bar_config(disable=True)
    begun = latents(pipe, "a cat", regions=regions(), denoising_end=0.5, num_inference_steps=4)
    settings = {"num_inference_steps": 4, "output_type": "latent", "image": begun, "denoising_start": 0.5}
    ended = ending("a cat", regions=regions(), generator=torch.Generator().manual_seed(0), **settings).images
    whole = latents(pipe, "a cat", regions=regions(), num_inference_steps=4)
    torch.testing.assert_close(ended, whole, rtol=1e-3, atol=1e-2)


def test_a_single_file_is_loaded_as_the_parent_does(pipe, parent, latents, tmp_path):
    """With every part given, as a checkpoint of this size has no names that diffusers converts."""
    pipe.save_pretrained(tmp_path / "folder")
    mark = "conditioner.embedders.1.model.transformer.resblocks.9.mlp.c_proj.bias"
    save_file({mark: torch.zeros(1)}, tmp_path / "x.safetensors")
    made = MixOfShowXLPipeline.from_single_file(
        tmp_path / "x.safetensors", config=str(tmp_path / "folder"), **parent.components, add_watermarker=False
    )
    made.set_progress_bar_config(disable=True)
    assert torch.equal(latents(made, "a cat", regions=regions()), latents(pipe, "a cat", regions=regions()))


def test_textual_inversions_of_both_encoders_are_loaded_as_a_concept(pipe, latents, tmp_path):
    """Equal embeddings for all groups and for the vector: what words of the tokenizers would draw."""
    random = torch.Generator().manual_seed(0)
    vectors = {"clip_l": torch.randn(2, 32, generator=random), "clip_g": torch.randn(2, 48, generator=random)}
    save_file(vectors, tmp_path / "rex.safetensors")
    pipe.load_edlora(tmp_path / "rex.safetensors")
    found = latents(pipe, "a <rex> here")
    pipe.unload_edlora()
    for name, encoder in (("clip_l", "text_encoder"), ("clip_g", "text_encoder_2")):
        words = pipe.components[encoder.replace("text_encoder", "tokenizer")]
        model = pipe.components[encoder]
        words.add_tokens(["<one>", "<two>"])
        model.resize_token_embeddings(len(words), mean_resizing=False)
        model.get_input_embeddings().weight.data[-2:] = vectors[name]
    torch.testing.assert_close(latents(pipe, "a <one><two> here"), found, rtol=1e-4, atol=1e-3)


def test_drafts_are_told_what_size_to_avoid_and_keep_their_own_as_the_targets(pipe, latents):
    told = []

    def note(_unet, inputs, named):
        if inputs[0].shape[2:] != (16, 32):
            told.append((2.0 * inputs[0].shape[2], 2.0 * inputs[0].shape[3], named["added_cond_kwargs"]["time_ids"]))

    hook = pipe.unet.register_forward_pre_hook(note, with_kwargs=True)
    sizes = SIZES | {f"negative_{name}": tuple(2 * each for each in value) for name, value in SIZES.items()}
    settings = {"num_inference_steps": 4, "height": 32, "width": 64, "regions": [Region("a cat", box=LEFT)]}
    latents(pipe, "x", draft=Draft(), **settings, **sizes)
    hook.remove()
    assert told
    for height, width, ids in told:
        assert ids.tolist() == [[128, 96, 16, 8, height, width], [64, 48, 8, 4, height, width]]
