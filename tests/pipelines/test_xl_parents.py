"""All that diffusers' own tests ask of its five SDXL pipelines, asked of ours: bit for bit the parent's answer."""

import copy
import inspect

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionXLAdapterPipeline, StableDiffusionXLPipeline

import tiny
from diffusers_mixofshow import Draft, MixOfShowXLPipeline, Refinement, Region
from diffusers_mixofshow.errors import ConfigurationError
from families.pipelines import tiny_pipeline
from pipelines import test_xl_siblings as siblings


KINDS = {"": (MixOfShowXLPipeline, StableDiffusionXLPipeline, siblings.SIZE), **siblings.KINDS}
WIDTH, PROJECTED = 32 + 48, 40
SIZES = {"original_size": (64, 48), "crops_coords_top_left": (8, 4), "target_size": (40, 24)}
ENCODING = ("tokenizer", "tokenizer_2", "text_encoder", "text_encoder_2")


def random(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


EMBEDDED = {
    "prompt": None,
    "prompt_embeds": random(1, 77, WIDTH, seed=1),
    "negative_prompt_embeds": random(1, 77, WIDTH, seed=2),
    "pooled_prompt_embeds": random(1, PROJECTED, seed=3),
    "negative_pooled_prompt_embeds": random(1, PROJECTED, seed=4),
}
CALLS = {
    "a tuple": {"return_dict": False, "output_type": "pt"},
    "pictures": {"output_type": "pil"},
    "arrays": {"output_type": "np"},
    "tensors": {"output_type": "pt"},
    "several prompts": {"prompt": ["a dog", "a cat"], "negative_prompt": ["x", "y"]},
    "several pictures": {"num_images_per_prompt": 2},
    "texts for each encoder": {"prompt_2": "oil", "negative_prompt": "bad", "negative_prompt_2": "worse"},
    "something to avoid for the second encoder alone": {"negative_prompt_2": "worse"},
    "no guidance": {"guidance_scale": 1.0},
    "rescaled guidance": {"guidance_rescale": 0.7},
    "timesteps": {"timesteps": [800, 300]},
    "sigmas": {"sigmas": [9.0, 3.0, 1.0]},
    "the first half": {"denoising_end": 0.5, "num_inference_steps": 4},
    "the second half": {"denoising_start": 0.5, "num_inference_steps": 4},
    "sizes": SIZES,
    "sizes to avoid": SIZES | {f"negative_{name}": value[::-1] for name, value in SIZES.items()},
    "fewer text layers": {"clip_skip": 1},
    "a strength of LoRAs": {"cross_attention_kwargs": {"scale": 0.5}},
    "embeddings": EMBEDDED,
    "vectors": {"pooled_prompt_embeds": random(1, PROJECTED, seed=5)},
}


@pytest.fixture(scope="module")
def components():
    return tiny_pipeline("Stable Diffusion XL").components


@pytest.fixture(scope="module")
def extras(components):
    return {"ControlNet": {"controlnet": tiny.controlnet(components["unet"])}, "Adapter": {"adapter": tiny.adapter()}}


@pytest.fixture(params=KINDS, ids=lambda kind: kind or "plain")
def kind(request):
    return request.param


@pytest.fixture
def build(components, extras, kind):
    """A function that makes a quiet pipeline of ours, or of diffusers."""

    def make(*, parent=False, **others):
        cls = KINDS[kind][1 if parent else 0]
        given = {**components, **extras.get(kind, {}), **others}
        if cls is not StableDiffusionXLAdapterPipeline:
            given["add_watermarker"] = False
        return quiet(cls(**given))

    return make


def quiet(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def output(pipeline, kind, **settings):
    """What a call returns, with the settings that the kind needs."""
    given = {"prompt": "a dog", **KINDS[kind][2], "num_inference_steps": 2, "output_type": "latent", **settings}
    if kind == "Adapter" and isinstance(given["prompt"], list):
        given["image"] = [siblings.picture(seed) for seed in range(len(given["prompt"]))]
    return pipeline(generator=torch.Generator().manual_seed(0), **given)


def equal(one, other):
    """Whether two results are the same numbers in the same kind of things."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, list | tuple):
        return type(one) is type(other) and len(one) == len(other) and all(map(equal, one, other))
    if hasattr(one, "images"):
        return type(one) is type(other) and equal(one.images, other.images)
    return type(one) is type(other) and bool(one == other if not hasattr(one, "all") else (one == other).all())


@pytest.mark.parametrize("call", CALLS)
def test_a_call_returns_what_the_parent_returns(build, kind, call):
    parent, settings = build(parent=True), CALLS[call]
    if settings.keys() - inspect.signature(parent.__call__).parameters.keys():
        assert kind in ("", "ControlNet", "Adapter")  # the other ones take all of these
        pytest.skip("the parent has no such argument")
    assert equal(output(build(), kind, **settings), output(parent, kind, **settings))


@pytest.mark.parametrize("call", ["no guidance", "something to avoid for the second encoder alone"])
def test_without_zeros_for_no_prompt_the_empty_text_is_read(build, kind, call):
    both = [build(parent=parent, force_zeros_for_empty_prompt=False) for parent in (False, True)]
    ours, theirs = (output(pipeline, kind, **CALLS[call]).images for pipeline in both)
    assert torch.equal(ours, theirs)
    everywhere = [Region("a dog", box=(0, 0, 1, 1))]
    assert torch.allclose(output(both[0], kind, regions=everywhere, **CALLS[call]).images, theirs, atol=1e-3)


def test_callbacks_get_every_tensor_that_the_parent_offers_and_may_change_them(build, kind):
    names = KINDS[kind][0]._callback_tensor_inputs
    seen = {}

    def note(pipeline, step, timestep, tensors):
        seen.setdefault(type(pipeline), []).append((step, timestep, tensors["latents"].clone(), sorted(tensors)))
        return tensors | {"latents": torch.zeros_like(tensors["latents"])} if step == 1 else tensors

    given = {"callback_on_step_end": note, "callback_on_step_end_tensor_inputs": names, "num_inference_steps": 3}
    ours = output(build(), kind, **given).images
    assert [step for step, *_ in seen[KINDS[kind][0]]] == list(range(len(seen[KINDS[kind][0]])))
    assert all(told == sorted(names) for *_, told in seen[KINDS[kind][0]])
    if kind != "Adapter":  # whose parent has the older callback
        assert torch.equal(ours, output(build(parent=True), kind, **given).images)
        pairs = zip(*seen.values(), strict=True)
        assert all(step == their and torch.equal(one, other) for (step, _, one, _), (their, _, other, _) in pairs)
    with pytest.raises(ValueError, match="callback_on_step_end_tensor_inputs"):
        output(build(), kind, callback_on_step_end_tensor_inputs=["nothing"])


def test_a_call_can_be_interrupted(build, kind):
    steps = []

    def stop(pipeline, step, _timestep, tensors):
        steps.append((type(pipeline), step))
        pipeline._interrupt = True
        return tensors

    ours = build()
    pictures = output(ours, kind, callback_on_step_end=stop, num_inference_steps=3).images
    assert steps == [(KINDS[kind][0], 0)]
    if kind != "Adapter":
        theirs = output(build(parent=True), kind, callback_on_step_end=stop, num_inference_steps=3).images
        assert torch.equal(pictures, theirs)
    assert not torch.equal(output(ours, kind, num_inference_steps=3).images, pictures)  # the next one runs on


def test_it_is_saved_and_loaded_and_made_of_its_parent_and_the_reverse(build, kind, tmp_path):
    ours, theirs = build(), build(parent=True)
    expected = output(theirs, kind).images
    ours.save_pretrained(tmp_path)
    found = output(quiet(KINDS[kind][0].from_pretrained(tmp_path)), kind).images
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)
    extra = {name: part for name, part in ours.components.items() if name in ("controlnet", "adapter")}
    for made in (KINDS[kind][0].from_pipe(theirs, **extra), KINDS[kind][1].from_pipe(ours, **extra)):
        assert all(made.components[name] is part for name, part in ours.components.items())
        assert torch.equal(output(quiet(made), kind).images, expected)


def test_parts_that_may_be_missing_may_be_missing(build, kind, tmp_path):
    """Embeddings are then given; a saved pipeline without these parts comes back without them."""
    expected = output(build(parent=True), kind, **EMBEDDED).images
    build(**dict.fromkeys(ENCODING)).save_pretrained(tmp_path)
    loaded = quiet(KINDS[kind][0].from_pretrained(tmp_path))
    assert all(loaded.components[name] is None for name in ENCODING)
    torch.testing.assert_close(output(loaded, kind, **EMBEDDED).images, expected, rtol=1e-4, atol=1e-3)


def test_its_parts_are_offloaded_in_the_parents_order(kind):
    ours, theirs, _ = KINDS[kind]
    assert ours.model_cpu_offload_seq.replace("->adapter", "") == theirs.model_cpu_offload_seq
    assert set(ours._optional_components) == set(theirs._optional_components)
    if kind != "Adapter":
        assert ours._callback_tensor_inputs == theirs._callback_tensor_inputs


def test_pictures_of_an_ip_adapter_are_seen(extras, kind):
    parts = tiny_pipeline("Stable Diffusion XL").components
    tiny.add_ip_adapter(parts["unet"])
    watermarker = [{"add_watermarker": False}, {} if kind == "Adapter" else {"add_watermarker": False}]
    ours, theirs = (
        quiet(cls(**parts, **extras.get(kind, {}), **mark))
        for cls, mark in zip(KINDS[kind][:2], watermarker, strict=True)
    )
    seen = [output(ours, kind, ip_adapter_image_embeds=[3 * random(2, 1, 8, seed=seed)]).images for seed in range(2)]
    assert torch.equal(seen[0], output(theirs, kind, ip_adapter_image_embeds=[3 * random(2, 1, 8, seed=0)]).images)
    assert not torch.allclose(*seen, atol=1e-2)


@pytest.mark.parametrize("side", ["", "negative_"])
def test_embeddings_without_their_vector_are_one_clear_error(build, kind, side):
    vector = f"{side}pooled_prompt_embeds"
    given = {name: each for name, each in EMBEDDED.items() if name != vector}
    with pytest.raises(ValueError, match=f"`?{side}prompt_embeds`? .*{vector}"):
        output(build(), kind, **given)


def test_an_autoencoder_in_float16_computes_in_float32(extras, kind):
    """SDXL's overflows in float16; drafting and drawing anew decode and encode with it, too."""
    parts = tiny_pipeline("Stable Diffusion XL").components
    own = {"use_quant_conv": True, "use_post_quant_conv": True, "force_upcast": True}
    vae = AutoencoderKL.from_config({**parts["vae"].config, **own}).eval()
    pipe = quiet(KINDS[kind][0](**{**parts, "vae": vae}, **copy.deepcopy(extras.get(kind, {})), add_watermarker=False))
    pipe.to(dtype=torch.float16)
    seen = []
    for half in (vae.encoder, vae.decoder):
        half.register_forward_pre_hook(lambda module, inputs: seen.append((type(module).__name__, inputs[0].dtype)))
    settings = {"regions": [Region("a cat", box=(0, 0, 0.5, 0.5))], "refine": Refinement(), "num_inference_steps": 4}
    if kind in ("", "ControlNet", "Adapter"):
        settings["draft"] = Draft()
    output(pipe, kind, output_type="pil", **settings)
    assert set(seen) == {("Encoder", torch.float32), ("Decoder", torch.float32)}
    assert seen.count(("Decoder", torch.float32)) == 2
    assert {weights.dtype for weights in vae.parameters()} == {torch.float16}


@pytest.mark.parametrize("missing", ENCODING)
@pytest.mark.parametrize("regions", [None, [Region("a cat", box=(0, 0, 0.5, 1))]], ids=["no regions", "regions"])
def test_a_missing_encoder_is_one_clear_error(components, missing, regions):
    pipe = quiet(MixOfShowXLPipeline(**{**components, missing: None}, add_watermarker=False))
    with pytest.raises(ConfigurationError, match=rf"has no {missing}, so that .* expected all of text_encoder, "):
        output(pipe, "", regions=regions)
    if regions:
        with pytest.raises(ConfigurationError, match=f"has no {missing}, so that"):
            output(pipe, "", regions=regions, **EMBEDDED)
    else:
        output(pipe, "", **EMBEDDED)
