"""What a region's settings do to a picture, regions for each prompt, warnings and errors."""

import warnings

import numpy as np
import pytest
import torch

import tiny
from diffusers_mixofshow.conditioning.attention import _Projected
from diffusers_mixofshow.errors import MixOfShowWarning, RegionError
from diffusers_mixofshow.pipelines import MixOfShowAdapterPipeline, MixOfShowControlNetPipeline, MixOfShowPipeline
from diffusers_mixofshow.regions import Isolation, Layout, Region


LEFT, RIGHT, FULL = (0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0), (0, 0, 1, 1)
MASK = np.ones((32, 32), dtype=np.uint8) * 255


@pytest.fixture
def potter(pipe, make_pack):
    """The pipeline with one concept."""
    pipe.load_edlora(make_pack("potter"))
    return pipe


def _region(**settings):
    return Region("a <potter>", **{"box": LEFT, **settings})


@pytest.mark.parametrize(
    "setting",
    [{"weight": 0.5}, {"feather": 0.3}, {"guidance_scale": 2.0}, {"start": 0.5}, {"end": 0.5}, {"order": 1}],
    ids=lambda setting: next(iter(setting)),
)
def test_each_setting_matters(potter, latents, setting):
    others = [Region("a dog", box=(0.25, 0, 1, 1))]
    plain = latents(potter, "x", regions=[_region(), *others])
    changed = latents(potter, "x", regions=[_region(**setting), *others])
    assert not torch.allclose(changed, plain, atol=1e-5)
    assert torch.equal(latents(potter, "x", regions=[_region(), *others]), plain)


def test_guidance_of_a_full_region_is_that_of_the_call(potter, latents):
    expected = latents(potter, "a <potter>", guidance_scale=3.0)
    regions = [_region(box=FULL, guidance_scale=3.0)]
    assert torch.allclose(latents(potter, "x", regions=regions, guidance_scale=9.0), expected, atol=1e-5)
    assert potter.guidance_scale == 9.0


@pytest.mark.parametrize(("region", "first"), [({"end": 0.5}, "a <potter>"), ({"start": 0.5}, "x")])
def test_regions_hold_in_their_steps(potter, latents, region, first):
    seen = {}

    def keep(name):
        def callback(_pipeline, step, _timestep, tensors):
            seen.setdefault(name, []).append(tensors["latents"].clone())
            return tensors

        return callback

    latents(potter, first, callback_on_step_end=keep("plain"))
    latents(potter, "x", regions=[_region(box=FULL, **region)], callback_on_step_end=keep("regional"))
    assert torch.allclose(seen["regional"][0], seen["plain"][0], atol=1e-5)
    if first != "x":
        assert not torch.allclose(seen["regional"][1], seen["plain"][1], atol=1e-5)


@pytest.mark.parametrize("pictures", [1, 2])
def test_each_prompt_has_its_regions(potter, pictures):
    layouts = [
        [_region(negative_prompt="beard"), Region("a dog", box=RIGHT)],
        None,
        Layout([_region(box=RIGHT, guidance_scale=2.0, end=0.5)]),
    ]
    prompts = ["one", "a <potter>", "three"]
    noise = torch.randn(3 * pictures, 4, 16, 16, generator=torch.Generator().manual_seed(3))
    settings = {"num_inference_steps": 2, "output_type": "latent", "height": 32, "width": 32}
    settings |= {"num_images_per_prompt": pictures}
    together = potter(prompts, regions=layouts, latents=noise, **settings).images
    for row, (prompt, layout) in enumerate(zip(prompts, layouts, strict=True)):
        own = slice(row * pictures, (row + 1) * pictures)
        alone = potter(prompt, regions=layout, latents=noise[own], **settings).images
        assert torch.allclose(together[own], alone, atol=1e-4)


def test_a_layout_is_a_whole_call(potter, latents):
    layout = Layout([_region()], prompt="x", negative_prompt="bad", width=32, height=32)
    expected = latents(potter, "x", negative_prompt="bad", regions=[_region()])
    random = torch.Generator().manual_seed(0)
    result = potter(**layout.arguments(), num_inference_steps=2, output_type="latent", generator=random).images
    assert torch.equal(result, expected)
    assert torch.equal(latents(potter, "x", negative_prompt="bad", regions=layout), expected)


@pytest.mark.parametrize("kind", ["controlnet", "adapter"])
def test_strength_of_control_by_region(components, make_pack, kind):
    if kind == "controlnet":
        pipeline = MixOfShowControlNetPipeline(
            **components, controlnet=tiny.controlnet(components["unet"]), requires_safety_checker=False
        )
    else:
        pipeline = MixOfShowAdapterPipeline(**components, adapter=tiny.adapter(), requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_edlora(make_pack("potter"))
    scale = f"{kind}_conditioning_scale"

    def run(control_scale, **settings):
        regions = [Region("a <potter>", box=FULL, control_scale=control_scale)]
        random = torch.Generator().manual_seed(0)
        image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
        call = {"image": image, "generator": random, "num_inference_steps": 2, "output_type": "latent"}
        return pipeline("x", height=32, width=32, regions=regions, **call, **settings).images

    assert torch.allclose(run(0.4), run(1.0, **{scale: 0.4}), atol=1e-4)
    assert not torch.allclose(run(0.4), run(1.0), atol=1e-3)


@pytest.mark.parametrize(
    ("prompt", "regions", "words"),
    [
        (
            "x",
            [_region(), Region("an old Man", box=RIGHT)],
            ["'an old Man' without <potter>, which is a man: drawn as any man"],
        ),
        ("a <potter>", [Region("a dog", box=LEFT)], ["only the global prompt names a concept"]),
        ("x", [_region(box=(0.5, 0, 0.501, 1))], ["smaller than a cell", "16 x 16"]),
        ("x", [_region(), _region(box=RIGHT)], ["cover the whole picture"]),
        ("x", [_region(end=0.1)], ["never holds", "2 steps"]),
        ("x", [_region(control_scale=0.5)], ["no control"]),
    ],
)
def test_what_has_no_effect_is_said(potter, latents, prompt, regions, words):
    with pytest.warns(MixOfShowWarning) as caught:
        latents(potter, prompt, regions=regions)
    assert len(caught) == 1
    assert all(word in str(caught[0].message) for word in words)


def test_a_region_of_something_else_is_nothing_to_remark_on(potter, latents):
    with warnings.catch_warnings():
        warnings.simplefilter("error", MixOfShowWarning)
        latents(potter, "x", regions=[_region(), Region("a dog and a manatee", box=(0.75, 0, 1, 1))])


def _told_of_call(pipe, latents, prompt, **settings):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        latents(pipe, prompt, **settings)
    return [str(one.message) for one in caught if issubclass(one.category, MixOfShowWarning)]


@pytest.mark.parametrize(
    ("prompt", "told"),
    [
        ("x", ["no prompt names <potter>, so that only weight updates act; write 'a <potter>'."]),
        (["x", "y"], ["no prompt names <potter>, so that only weight updates act; write 'a <potter>'."]),
        (["x", "a <potter>"], []),
        ("a <potter1>", []),
        ("Potter at school", ["the prompt says Potter; did you mean <potter>?"]),
    ],
)
def test_a_loaded_concept_that_no_prompt_names_is_said(potter, latents, prompt, told):
    assert _told_of_call(potter, latents, prompt) == told


@pytest.mark.parametrize(
    ("prompt", "told"),
    [
        ("a <ron>", []),
        ("a <ron> and Potter", ["the prompt says Potter; did you mean <potter>?"]),
        ("x", ["no prompt names <potter>, <ron>, so that only weight updates act; write 'a <potter>'."]),
    ],
)
def test_of_several_loaded_concepts_one_is_enough(potter, make_pack, latents, prompt, told):
    potter.load_edlora(make_pack("ron", seed=1))
    assert _told_of_call(potter, latents, prompt) == told


def test_it_is_said_before_the_picture_is_drawn(potter, latents):
    """What is wrong with the prompt is known at once, while a picture may take minutes."""
    seen = []

    def stop(*_):
        seen.append([str(one.message) for one in caught])
        raise KeyboardInterrupt

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", MixOfShowWarning)
        with pytest.raises(KeyboardInterrupt):
            latents(potter, "x", callback_on_step_end=stop)
    assert "no prompt names <potter>" in seen[0][0]


def test_a_prompt_without_a_concept_is_not_remarked_upon_where_none_is_loaded(components, latents):
    pipe = MixOfShowPipeline(**components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    assert _told_of_call(pipe, latents, "x") == []


def test_a_global_prompt_without_a_place_is_said_with_isolation_in_some_steps(potter, latents):
    with pytest.warns(MixOfShowWarning, match="cover the whole picture"):
        latents(potter, "x", regions=[_region(), _region(box=RIGHT)], isolation=Isolation(end=0.5))


def test_a_good_layout_is_not_remarked_upon(potter, latents):
    with warnings.catch_warnings():
        warnings.simplefilter("error", MixOfShowWarning)
        latents(potter, "x", regions=[_region(), _region(box=(0.6, 0, 1, 1))])
        latents(potter, "a <potter>")


def test_strengths_of_zero_are_said(components):
    adapted = MixOfShowAdapterPipeline(**components, adapter=tiny.adapter(), requires_safety_checker=False)
    controlled = MixOfShowControlNetPipeline(
        **components, controlnet=tiny.controlnet(components["unet"]), requires_safety_checker=False
    )
    image = torch.rand(1, 3, 32, 32)
    for pipeline, name in ((adapted, "adapter"), (controlled, "controlnet")):
        pipeline.set_progress_bar_config(disable=True)
        call = {"image": image, "num_inference_steps": 1, "output_type": "latent", f"{name}_conditioning_scale": 0.0}
        with pytest.warns(MixOfShowWarning, match="strength of 0"):
            pipeline("x", **call)


def test_every_defect_of_a_call_is_named_at_once(potter):
    regions = [[_region(guidance_scale=3.0), {"prompt": "a"}], [_region()]]
    with pytest.raises(RegionError) as error:
        potter("x", regions=regions, height=33, guidance_scale=1.0)
    words = ["dict", "2 lists of regions for 1 prompts", "height 33", "divisible by 2", "guidance_scale above 1"]
    assert all(word in str(error.value) for word in words)
    with pytest.raises(RegionError, match="a Region; expected a list"):
        potter("x", regions=_region())
    with pytest.raises(RegionError, match="3 lists of regions for 2 prompts"):
        potter(["x", "y"], regions=[[_region()], None, []])
    assert potter._regions == ()


def test_isolation_matters_and_is_off_by_default(potter, latents):
    regions = [_region(), Region("a <potter> here", box=(0.6, 0, 1, 1))]
    plain = latents(potter, "x", regions=regions)
    isolated = latents(potter, "x", regions=regions, isolation=Isolation())
    early = latents(potter, "x", regions=regions, isolation=Isolation(end=0.5))
    assert not any(
        torch.allclose(one, other, atol=1e-5) for one, other in [(plain, isolated), (plain, early), (isolated, early)]
    )
    assert torch.equal(latents(potter, "x", regions=regions), plain)
    assert torch.equal(latents(potter, "x", isolation=Isolation()), latents(potter, "x"))
    with pytest.raises(RegionError, match="bool"):
        latents(potter, "x", regions=regions, isolation=True)


def test_a_change_of_a_loras_strength_between_steps_is_not_missed(potter, latents, monkeypatch):
    def weaken(pipeline, _step, _timestep, tensors):
        pipeline.set_adapters(["potter"], [0.0])
        return tensors

    def run():
        potter.set_adapters(["potter"], [1.0])
        return latents(potter, "x", regions=[_region()], callback_on_step_end=weaken)

    kept = run()
    monkeypatch.setattr(_Projected, "fits", lambda *_: False)
    assert torch.equal(run(), kept)
    plain = latents(potter, "x", regions=[_region()])
    assert not torch.allclose(plain, kept, atol=1e-5)


def test_inference_mode_and_channels_last(potter, latents):
    expected = latents(potter, "x", regions=[_region()])
    with torch.inference_mode():
        assert torch.equal(latents(potter, "x", regions=[_region()]), expected)
    potter.unet.to(memory_format=torch.channels_last)
    assert torch.allclose(latents(potter, "x", regions=[_region()]), expected, atol=1e-4)
