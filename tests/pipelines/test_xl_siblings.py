"""ControlNet, T2I-Adapter, image to image and inpainting with SDXL: their parents, and regions in them."""

import inspect

import numpy as np
import pytest
import torch
from diffusers import (
    StableDiffusionXLAdapterPipeline,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
)
from PIL import Image

import packs
import tiny
from diffusers_mixofshow import Draft, MixOfShowXLPipeline, Refinement, Region
from diffusers_mixofshow.errors import RegionError
from diffusers_mixofshow.families.layers import cross_attention_layers
from diffusers_mixofshow.pipelines import (
    MixOfShowXLAdapterPipeline,
    MixOfShowXLControlNetPipeline,
    MixOfShowXLImg2ImgPipeline,
    MixOfShowXLInpaintPipeline,
    choose_pipeline,
)
from families.pipelines import tiny_pipeline


SIZE = {"height": 32, "width": 32}
REGIONS = [Region("a <rex>", box=(0, 0, 0.5, 1), negative_prompt="beard"), Region("a cat", box=(0.4, 0.2, 1, 1))]


def picture(seed=0, size=(32, 32)):
    values = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(values)


HALF = Image.fromarray(np.repeat(np.array([[0, 255]], dtype=np.uint8), 16, axis=1).repeat(32, axis=0))
KINDS = {
    "ControlNet": (MixOfShowXLControlNetPipeline, StableDiffusionXLControlNetPipeline, {"image": picture(), **SIZE}),
    "Adapter": (MixOfShowXLAdapterPipeline, StableDiffusionXLAdapterPipeline, {"image": picture(), **SIZE}),
    "Img2Img": (MixOfShowXLImg2ImgPipeline, StableDiffusionXLImg2ImgPipeline, {"image": picture(), "strength": 0.99}),
    "Inpaint": (
        MixOfShowXLInpaintPipeline,
        StableDiffusionXLInpaintPipeline,
        {"image": picture(), "mask_image": HALF, **SIZE},
    ),
}


@pytest.fixture(scope="module")
def components():
    return tiny_pipeline("Stable Diffusion XL").components


@pytest.fixture(scope="module")
def extras(components):
    net = tiny.controlnet(components["unet"])
    return {"ControlNet": {"controlnet": net}, "Adapter": {"adapter": tiny.adapter()}}


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def build(components, extras):
    """A function from a kind to a quiet pipeline of ours, or of diffusers."""

    def make(kind, *, parent=False, **others):
        cls = KINDS[kind][1 if parent else 0]
        given = {**components, **extras.get(kind, {}), **others}
        if cls is not StableDiffusionXLAdapterPipeline:
            given["add_watermarker"] = False
        pipeline = cls(**given)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    return make


@pytest.fixture
def rex(build, kind, components):
    pipeline = build(kind)
    pipeline.load_edlora(packs.random_pack(components), scale=0.2)
    yield pipeline
    pipeline.unload_edlora()


def run(pipeline, prompt, kind, seed=0, **settings):
    arguments = {**KINDS[kind][2], "num_inference_steps": 2, "output_type": "latent", **settings}
    return pipeline(prompt, generator=torch.Generator().manual_seed(seed), **arguments).images


ARGUMENTS = [
    {},
    {"negative_prompt": "bad", "prompt_2": "in oil"},
    {"guidance_scale": 1.0},
    {"original_size": (64, 48), "crops_coords_top_left": (8, 4), "target_size": (40, 24), "clip_skip": 1},
]


@pytest.mark.parametrize("arguments", ARGUMENTS, ids=lambda arguments: ",".join(arguments) or "nothing")
def test_without_concepts_and_regions_it_is_its_parent(build, kind, arguments):
    expected = run(build(kind, parent=True), "a dog", kind, **arguments)
    assert torch.equal(run(build(kind), "a dog", kind, **arguments), expected)
    assert torch.equal(run(build(kind), "a dog", kind, regions=[], **arguments), expected)


def test_arguments_are_the_parents_and_regions(kind):
    ours, theirs, _ = KINDS[kind]
    added = {"regions", "isolation", "draft", "refine"}
    wanted = set(inspect.signature(theirs.__call__).parameters) | added
    if kind == "Adapter":  # ours is the plain pipeline, which has the newer callback
        wanted = set(inspect.signature(StableDiffusionXLPipeline.__call__).parameters) | added
        wanted |= {"image", "adapter_conditioning_scale", "adapter_conditioning_factor"}
    assert set(inspect.signature(ours.__call__).parameters) == wanted


def test_a_full_region_is_the_prompt_where_the_vector_is_the_same(rex, kind):
    expected = run(rex, "a <rex>", kind)
    pooled = rex.encode_prompt("a <rex>", num_images_per_prompt=1, do_classifier_free_guidance=False)[2]
    everywhere = [Region("a <rex>", box=(0, 0, 1, 1))]
    found = run(rex, "a dog", kind, regions=everywhere, pooled_prompt_embeds=pooled)
    assert torch.allclose(found, expected, atol=1e-3)
    assert not torch.allclose(run(rex, "a dog", kind, pooled_prompt_embeds=pooled), expected, atol=1e-2)


def test_regions_matter_and_nothing_stays(rex, kind):
    processors = {id(net): dict(net.attn_processors) for net in rex._denoisers()}
    plain = run(rex, "x", kind)
    assert not torch.allclose(run(rex, "x", kind, regions=REGIONS), plain, atol=1e-3)
    assert torch.equal(run(rex, "x", kind), plain)
    for net in rex._denoisers():
        assert all(net.attn_processors[name] is each for name, each in processors[id(net)].items())


def test_it_is_made_of_the_plain_pipeline_with_its_concepts(components, extras, kind):
    plain = MixOfShowXLPipeline(**components, add_watermarker=False)
    plain.load_edlora(packs.random_pack(components), scale=0.2)
    made = choose_pipeline(components, kind).from_pipe(plain, **extras.get(kind, {}))
    made.set_progress_bar_config(disable=True)
    assert type(made) is KINDS[kind][0]
    assert list(made.concepts) == ["<rex>"]
    assert not torch.equal(run(made, "a <rex>", kind), run(made, "a dog", kind))
    plain.unload_edlora()


def test_a_controlnet_sees_the_encoding_of_each_group(build, components):
    """Its layers are those of the U-Net of the same names: each reads what that reads."""
    pipe = build("ControlNet")
    pipe.load_edlora(packs.random_pack(components), scale=0.2)
    seen = {}

    def note(owner, path):
        return lambda _module, inputs: seen.setdefault((owner, path), inputs[0].clone())

    hooks = [
        net.get_submodule(path).to_k.register_forward_pre_hook(note(owner, path))
        for owner, net in (("unet", pipe.unet), ("controlnet", pipe.controlnet))
        for path in cross_attention_layers(net)
    ]
    run(pipe, "a <rex>", "ControlNet")
    for hook in hooks:
        hook.remove()
    pipe.unload_edlora()
    own = {path: rows for (owner, path), rows in seen.items() if owner == "controlnet"}
    assert len(own) == 4
    assert all(torch.equal(rows, seen["unet", path]) for path, rows in own.items())
    down, mid = (own[f"{block}.transformer_blocks.0.attn2"] for block in
                 ("down_blocks.1.attentions.0", "mid_block.attentions.0"))  # fmt: skip
    assert torch.equal(own["mid_block.attentions.0.transformer_blocks.1.attn2"], mid)
    assert not torch.allclose(down, mid, atol=1e-3)


def test_drafts_are_for_calls_that_begin_with_noise(rex, kind):
    settings = {"regions": REGIONS, "draft": Draft(), "num_inference_steps": 4}
    if kind in ("ControlNet", "Adapter"):
        drafted = run(rex, "x", kind, **settings)
        assert not torch.allclose(drafted, run(rex, "x", kind, regions=REGIONS, num_inference_steps=4), atol=1e-3)
    else:
        with pytest.raises(RegionError, match="begins with a picture"):
            run(rex, "x", kind, **settings)


def test_regions_are_drawn_anew_in_the_end(rex, kind):
    settings = {"regions": REGIONS, "output_type": "pil", "num_inference_steps": 3}
    plain = run(rex, "x", kind, **settings)[0]
    refined = run(rex, "x", kind, refine=Refinement(), **settings)[0]
    assert plain.size == refined.size == (32, 32)
    assert np.abs(np.asarray(plain, dtype=int) - np.asarray(refined, dtype=int)).max() > 10


def test_inpainting_a_crop_moves_its_regions(build):
    pipe = build("Inpaint")
    corner = Image.fromarray(np.pad(np.full((8, 8), 255, dtype=np.uint8), ((0, 24), (0, 24))))
    given = {"mask_image": corner, "padding_mask_crop": 2}
    outside = [Region("a cat", box=(0.8, 0.8, 1, 1))]
    with pytest.warns(match="outside of what padding_mask_crop draws"):
        missed = run(pipe, "x", "Inpaint", regions=outside, output_type="pil", **given)
    inside = run(pipe, "x", "Inpaint", regions=[Region("a cat", box=(0, 0, 0.2, 0.2))], output_type="pil", **given)
    plain = run(pipe, "x", "Inpaint", output_type="pil", **given)
    assert np.array_equal(np.asarray(missed[0]), np.asarray(plain[0]))
    assert not np.array_equal(np.asarray(inside[0]), np.asarray(plain[0]))


def test_several_adapters_act_by_their_strengths(build):
    images = [picture(1), picture(2)]
    both = build("Adapter", adapter=[tiny.adapter(seed=1), tiny.adapter(seed=2)])
    one = build("Adapter", adapter=tiny.adapter(seed=1))
    with pytest.warns(match="strength of 0"):
        first_alone = run(both, "x", "Adapter", image=images, adapter_conditioning_scale=[1.0, 0.0])
    torch.testing.assert_close(first_alone, run(one, "x", "Adapter", image=images[0]), rtol=1e-4, atol=1e-3)
    weak = [Region("a cat", box=(0, 0, 1, 1), control_scale=0.0)]
    first = run(one, "a cat", "Adapter", image=images[0], regions=weak)
    torch.testing.assert_close(
        first, run(one, "a cat", "Adapter", image=images[1], regions=weak), rtol=1e-4, atol=1e-3
    )


def test_regions_are_drawn_anew_with_the_guidance_of_the_call_also_where_it_is_the_pipelines_own(build):
    """Inpainting with SDXL is guided more strongly by default than image to image."""
    pipe = build("Inpaint")
    settings = {"regions": [Region("a cat", box=(0, 0, 0.5, 0.5))], "output_type": "pil", "num_inference_steps": 3}
    own = run(pipe, "x", "Inpaint", refine=Refinement(), **settings)[0]
    given, other = (
        run(pipe, "x", "Inpaint", refine=Refinement(), guidance_scale=scale, **settings)[0] for scale in (7.5, 5.0)
    )
    assert np.array_equal(np.asarray(own), np.asarray(given))
    assert not np.array_equal(np.asarray(own), np.asarray(other))
