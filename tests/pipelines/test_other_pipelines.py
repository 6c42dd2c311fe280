"""ControlNet, T2I-Adapter, image to image and inpainting: their parents without concepts, and concepts in regions."""

import inspect

import numpy as np
import pytest
import torch
from diffusers import (
    MultiControlNetModel,
    StableDiffusionAdapterPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from PIL import Image

import tiny
from diffusers_mixofshow.errors import ConfigurationError, MixOfShowWarning
from diffusers_mixofshow.families.layers import cross_attention_layers
from diffusers_mixofshow.pipelines import (
    MixOfShowAdapterPipeline,
    MixOfShowControlNetPipeline,
    MixOfShowImg2ImgPipeline,
    MixOfShowInpaintPipeline,
    MixOfShowPipeline,
)
from diffusers_mixofshow.regions import Region


SIZE = {"height": 32, "width": 32}
STEPS = {"num_inference_steps": 2, "output_type": "latent"}
REGIONS = [
    Region("a <potter>", box=(0, 0, 0.5, 1), negative_prompt="beard"),
    Region("a dog", box=(0.4, 0.2, 1, 1)),
]


def picture(seed=0, size=(32, 32)):
    values = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(values)


HALF = Image.fromarray(np.repeat(np.array([[0, 255]], dtype=np.uint8), 16, axis=1).repeat(32, axis=0))
KINDS = {
    "controlnet": (MixOfShowControlNetPipeline, StableDiffusionControlNetPipeline, {"image": picture(), **SIZE}),
    "adapter": (MixOfShowAdapterPipeline, StableDiffusionAdapterPipeline, {"image": picture(), **SIZE}),
    "image to image": (
        MixOfShowImg2ImgPipeline,
        StableDiffusionImg2ImgPipeline,
        {"image": picture(), "strength": 0.99},
    ),
    "inpainting": (
        MixOfShowInpaintPipeline,
        StableDiffusionInpaintPipeline,
        {"image": picture(), "mask_image": HALF, **SIZE},
    ),
}


@pytest.fixture
def extras(components):
    """What a pipeline has beside the common components."""
    return {"controlnet": {"controlnet": tiny.controlnet(components["unet"])}, "adapter": {"adapter": tiny.adapter()}}


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def build(components, extras):
    """A function from a kind to a quiet pipeline of ours, or of diffusers."""

    def make(kind, *, parent=False, **others):
        cls = KINDS[kind][1 if parent else 0]
        given = {**components, **extras.get(kind, {}), **others}
        if cls is StableDiffusionAdapterPipeline:
            given.pop("image_encoder")
        pipeline = cls(**given, requires_safety_checker=False)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    return make


@pytest.fixture
def potter(build, kind, make_pack):
    """A pipeline of the kind with one concept."""
    pipeline = build(kind)
    pipeline.load_edlora(make_pack("potter"))
    return pipeline


def run(pipeline, prompt, kind, seed=0, **settings):
    arguments = {**KINDS[kind][2], **STEPS, "generator": torch.Generator().manual_seed(seed), **settings}
    return pipeline(prompt, **arguments).images


@pytest.mark.parametrize("arguments", [{}, {"negative_prompt": "bad"}, {"guidance_scale": 1.0}], ids=str)
def test_without_concepts_and_regions_it_is_its_parent(potter, build, kind, arguments):
    expected = run(build(kind, parent=True), "a dog", kind, **arguments)
    assert torch.equal(run(potter, "a dog", kind, **arguments), expected)
    assert torch.equal(run(potter, "a dog", kind, regions=[], **arguments), expected)


def test_a_full_region_is_the_prompt(potter, kind):
    everywhere = Region("a <potter>", box=(0, 0, 1, 1))
    expected = run(potter, "a <potter>", kind)
    assert not torch.allclose(run(potter, "a dog", kind), expected, atol=1e-5)
    assert torch.allclose(run(potter, "a dog", kind, regions=[everywhere]), expected, atol=1e-5)


def test_regions_matter_and_nothing_stays(potter, kind):
    processors = {id(net): dict(net.attn_processors) for net in potter._denoisers()}
    plain = run(potter, "x", kind)
    assert not torch.allclose(run(potter, "x", kind, regions=REGIONS), plain, atol=1e-4)
    assert torch.equal(run(potter, "x", kind), plain)
    for net in potter._denoisers():
        assert all(net.attn_processors[name] is processor for name, processor in processors[id(net)].items())
        assert not net._forward_pre_hooks


def test_batches_are_loops(potter, kind):
    noise = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(3))
    given = {} if kind == "image to image" else {"latents": noise}
    prompts = ["a dog", "a <potter> here"]

    def generators(rows):
        return [torch.Generator().manual_seed(row) for row in rows]

    # The parents draw one noise for a picture that all prompts share.
    own = {"image": [picture()] * 2, "mask_image": [HALF] * 2} if kind == "inpainting" else {}
    together = run(potter, prompts, kind, regions=REGIONS, generator=generators(range(2)), **given, **own)
    for row in range(2):
        one = {name: value[row : row + 1] for name, value in given.items()}
        alone = run(potter, prompts[row], kind, regions=REGIONS, generator=generators([row]), **one)
        assert torch.allclose(together[row], alone[0], atol=1e-4)


def test_callbacks_and_interruption(potter, kind):
    steps = []

    def callback(pipeline, step, _timestep, tensors):
        steps.append(step)
        pipeline._interrupt = True
        return tensors

    run(potter, "a <potter>", kind, regions=REGIONS, callback_on_step_end=callback)
    assert steps == [0]


def test_the_signature_is_the_parents_and_regions(kind):
    ours, theirs, _ = KINDS[kind]
    theirs = StableDiffusionPipeline if kind == "adapter" else theirs
    parent = inspect.signature(theirs.__call__).parameters
    parameters = inspect.signature(ours.__call__).parameters
    assert set(parent) <= set(parameters)
    assert "regions" in parameters
    assert "callback_on_step_end" in ours.__call__.__doc__


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_from_pipe_leaves_the_components_their_dtype(pipe, caplog, dtype):
    pipe.to(dtype)
    caplog.clear()
    with caplog.at_level("WARNING", logger="diffusers"):
        made = MixOfShowImg2ImgPipeline.from_pipe(pipe)
    assert {module.dtype for module in (made.unet, made.vae, made.text_encoder, pipe.unet)} == {dtype}
    assert not caplog.records
    assert MixOfShowPipeline.from_pipe(pipe, torch_dtype=torch.float32).unet.dtype == torch.float32


def test_concepts_come_along_from_pipe(pipe, make_pack, extras, kind):
    pipe.load_edlora(make_pack("potter"))
    cls = KINDS[kind][0]
    pipeline = cls.from_pipe(pipe, **extras.get(kind, {}))
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.unet is pipe.unet
    assert list(pipeline.concepts) == ["<potter>"]
    assert run(pipeline, "a <potter>", kind, regions=REGIONS).shape == (1, 4, 16, 16)
    back = MixOfShowPipeline.from_pipe(pipeline)
    assert list(back.concepts) == ["<potter>"]


def test_saved_and_loaded_it_is_the_same(build, kind, tmp_path):
    pipeline = build(kind)
    pipeline.save_pretrained(tmp_path)
    again = KINDS[kind][0].from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert torch.equal(run(again, "a dog", kind), run(pipeline, "a dog", kind))


def _texts_seen(denoiser):
    """Hooks that note the text which each cross-attention layer projects to keys, and their notes."""
    seen = {}
    for path in cross_attention_layers(denoiser):
        denoiser.get_submodule(path).to_k.register_forward_pre_hook(
            lambda _module, inputs, path=path: seen.setdefault(path, inputs[0].clone())
        )
    return seen


def test_a_controlnet_sees_the_embedding_of_each_of_its_layers(build, components, make_pack):
    nets = [tiny.controlnet(components["unet"], seed=seed) for seed in range(2)]
    pipeline = build("controlnet", controlnet=nets)
    pipeline.load_edlora(make_pack("potter"))
    notes = [_texts_seen(denoiser) for denoiser in (pipeline.unet, *nets)]
    run(pipeline, "a <potter>", "controlnet", image=[picture(), picture(1)])
    of_unet, *of_nets = notes
    for of_net, net in zip(of_nets, nets, strict=True):
        assert list(of_net) == list(cross_attention_layers(net))
        assert len(of_net) > 1
        for path, text in of_net.items():
            assert torch.equal(text, of_unet[path])
    first, second, *_ = of_unet.values()
    assert not torch.allclose(first, second, atol=1e-4)


def test_several_controlnets_and_one_twice(build, components, make_pack):
    net, other = (tiny.controlnet(components["unet"], seed=seed) for seed in range(2))
    for nets in ([net, other], [net, net]):
        pipeline = build("controlnet", controlnet=nets)
        pipeline.load_edlora(make_pack("potter"))
        images = [picture(), picture(1)]
        both = run(pipeline, "x", "controlnet", image=images, regions=REGIONS)
        first = run(
            pipeline, "x", "controlnet", image=images, regions=REGIONS, controlnet_conditioning_scale=[1.0, 0.0]
        )
        assert not torch.allclose(both, first, atol=1e-5)
        pipeline.unload_edlora()


def test_guess_mode(build, make_pack):
    pipeline = build("controlnet")
    pipeline.load_edlora(make_pack("potter"))
    assert run(pipeline, "x", "controlnet", regions=REGIONS, guess_mode=True).shape == (1, 4, 16, 16)


def test_several_adapters_are_added_by_their_strengths(build):
    adapters = [tiny.adapter(seed=0), tiny.adapter(seed=1, in_channels=1)]
    ours = build("adapter", adapter=adapters)
    images, scales = [picture(), picture(1).convert("L")], [0.7, 1.5]
    parent = build("adapter", parent=True, adapter=adapters)
    expected = run(parent, "a dog", "adapter", image=images, adapter_conditioning_scale=scales)
    result = run(ours, "a dog", "adapter", image=images, adapter_conditioning_scale=scales)
    assert torch.allclose(result, expected, atol=1e-5 * float(expected.abs().max()))  # of float32
    without = run(ours, "a dog", "adapter", image=images, adapter_conditioning_scale=0.0)
    assert not torch.allclose(result, without, atol=1e-3)


def test_the_size_is_the_condition_images_own(build):
    result = run(build("adapter"), "x", "adapter", image=picture(size=(51, 38)), height=None, width=None)
    assert result.shape[-2:] == (16, 24)


def test_each_prompt_has_its_condition_image(build):
    pipeline = build("adapter")
    noise = torch.randn(4, 4, 16, 16, generator=torch.Generator().manual_seed(3))
    images = [picture(), picture(1)]
    settings = {"num_images_per_prompt": 2, "generator": None}
    together = run(pipeline, ["a", "b"], "adapter", image=images, latents=noise, **settings)
    for row, prompt in enumerate(["a", "b"]):
        part = noise[2 * row : 2 * row + 2]
        alone = run(pipeline, prompt, "adapter", image=images[row], latents=part, **settings)
        assert torch.allclose(together[2 * row : 2 * row + 2], alone, atol=1e-4)


@pytest.mark.parametrize(
    ("adapters", "arguments", "words"),
    [
        (1, {"image": None}, ["1 condition image"]),
        (2, {"image": picture()}, ["list of 2"]),
        (2, {"image": [picture()]}, ["1 entries", "list of 2"]),
        (2, {"image": [picture()] * 2, "adapter_conditioning_scale": [1.0]}, ["1 values", "2 adapters"]),
        (1, {"image": [picture()] * 3}, ["3 condition images", "1 prompts"]),
    ],
)
def test_wrong_condition_images_are_refused(build, adapters, arguments, words):
    pipeline = build("adapter", adapter=[tiny.adapter(seed=seed) for seed in range(adapters)])
    with pytest.raises(ConfigurationError) as error:
        run(pipeline, "x", "adapter", **arguments)
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize(
    ("factor", "acting"), [(1.0, 4), (0.75, 3), (0.5, 2), (0.6, 2), (0.25, 1), (0.2, 0), (0.0, 0), (1, 4)]
)
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_adapters_act_in_the_first_part_of_the_steps(build, monkeypatch, factor, acting, guidance_scale):
    pipeline, forward, seen = build("adapter"), UNet2DConditionModel.forward, []

    def watched(self, *inputs, **named):
        seen.append(bool(named.get("down_intrablock_additional_residuals")))
        return forward(self, *inputs, **named)

    monkeypatch.setattr(UNet2DConditionModel, "forward", watched)
    settings = {"num_inference_steps": 4, "guidance_scale": guidance_scale}
    run(pipeline, "a dog", "adapter", adapter_conditioning_factor=factor, **settings)
    assert seen == [True] * acting + [False] * (4 - acting)


@pytest.mark.parametrize("factor", [-0.1, 1.1, float("nan"), "half", True, None])
def test_impossible_parts_of_the_steps_are_refused(build, factor):
    with pytest.raises(ConfigurationError, match="adapter_conditioning_factor"):
        run(build("adapter"), "a dog", "adapter", adapter_conditioning_factor=factor)


def test_adapters_have_what_the_plain_pipeline_has():
    for name in ("load_lora_weights", "load_textual_inversion", "load_ip_adapter", "load_edlora", "from_single_file"):
        assert callable(getattr(MixOfShowAdapterPipeline, name))


def test_adapters_beside_lora_files_and_textual_inversion(build, make_pack, tmp_path):
    pipeline = build("adapter")
    plain = run(pipeline, "a dog", "adapter")
    make_pack("potter").save_pretrained(tmp_path)
    pipeline.load_lora_weights(tmp_path, weight_name="edlora.safetensors")
    with_lora = run(pipeline, "a dog", "adapter")
    assert not torch.allclose(with_lora, plain, atol=1e-4)
    pipeline.unload_lora_weights()
    assert torch.allclose(run(pipeline, "a dog", "adapter"), plain, atol=1e-5)
    pipeline.load_textual_inversion(torch.randn(32, generator=torch.Generator().manual_seed(0)), token="<style>")
    styled = run(pipeline, "a dog <style>", "adapter")
    assert not torch.allclose(styled, run(pipeline, "a dog style", "adapter"), atol=1e-4)


def test_an_adapter_pipeline_has_all_that_it_is_made_of(components):
    """Also the parts that may be left out, and the switch of the safety checker."""
    given = components | {"image_encoder": components["vae"], "feature_extractor": components["tokenizer"]}
    for required in (False, True):
        made = MixOfShowAdapterPipeline(**given, adapter=tiny.adapter(), requires_safety_checker=required)
        assert made.config.requires_safety_checker is required
        assert all(made.components[name] is part for name, part in given.items() if part is not None)
    with pytest.warns(MixOfShowWarning, match="strength of 0 has no effect") as told:
        made("x", image=picture(), num_inference_steps=1, output_type="latent", adapter_conditioning_scale=0.0)
    assert len(told) == 1


def test_from_pipe_leaves_each_component_its_own_dtype(pipe):
    """As with a VAE in float32 beside a U-Net in half precision, against black pictures."""
    pipe.unet.to(torch.bfloat16)
    before = {name: each.clone() for name, each in pipe.vae.state_dict().items()}
    made = MixOfShowControlNetPipeline.from_pipe(pipe, controlnet=tiny.controlnet(pipe.unet).float())
    assert (made.vae.dtype, made.unet.dtype, made.controlnet.dtype) == (torch.float32, torch.bfloat16, torch.bfloat16)
    assert all(torch.equal(each, before[name]) for name, each in pipe.vae.state_dict().items())
    assert made.to(torch.float32).unet.dtype == torch.float32


def test_a_controlnet_that_is_listed_twice_counts_each_step_once(pipe):
    white = torch.ones(1, 3, 32, 32)
    drawn = []
    for same in (True, False):
        nets = [tiny.controlnet(pipe.unet) for _ in range(2)]
        nets = [nets[0]] * 2 if same else nets
        control = MixOfShowControlNetPipeline.from_pipe(pipe, controlnet=MultiControlNetModel(nets))
        regions = [Region("a dog", box=(0, 0, 0.5, 1), end=0.75)]
        drawn.append(
            control(
                "two dogs",
                image=[white, white],
                regions=regions,
                generator=torch.Generator().manual_seed(0),
                num_inference_steps=4,
                output_type="latent",
            ).images
        )
    assert torch.equal(*drawn)
