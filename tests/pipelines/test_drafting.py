"""Drafts: every region alone for a few steps, then put into the picture, and what the call makes of it."""

import copy
import re
import warnings

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EDMEulerScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2DiscreteScheduler,
    LCMScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    SASolverScheduler,
    TCDScheduler,
    UniPCMultistepScheduler,
)
from diffusers.callbacks import SDCFGCutoffCallback
from torch.nn import functional

import tiny
from diffusers_mixofshow import (
    Draft,
    Isolation,
    MixOfShowAdapterPipeline,
    MixOfShowControlNetPipeline,
    MixOfShowImg2ImgPipeline,
    MixOfShowInpaintPipeline,
    MixOfShowWarning,
    Refinement,
    Region,
)
from diffusers_mixofshow.concepts import Concept
from diffusers_mixofshow.errors import RegionError
from diffusers_mixofshow.pipelines.drafting import _split_prediction
from diffusers_mixofshow.pipelines.wording import repeat_subjects
from diffusers_mixofshow.regions import region_weights
from diffusers_mixofshow.regions.draft import find_window


STEPS = 4
LEFT, RIGHT = Region("a <potter>", box=(0, 0, 0.5, 1)), Region("a dog", box=(0.5, 0.25, 1, 1))
PLAIN = Draft(steps=2, repeat_subject=False)


@pytest.fixture
def potter(pipe, make_pack):
    """The pipeline with one concept; its scheduler looks back at earlier steps."""
    pipe.load_edlora(make_pack("potter"))
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    return pipe


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def draw(pipe, prompt="two friends", *, regions=(LEFT, RIGHT), seed=0, **settings):
    """Latents of a call."""
    given = {"num_inference_steps": STEPS, "output_type": "latent", "height": 32, "width": 64, "guidance_scale": 3.0}
    return pipe(prompt, regions=list(regions), generator=seeded(seed), **{**given, **settings}).images


def seen_by_unet(pipe, **settings):
    """What the U-Net is given in each pass on the whole picture, the first half of the batch."""
    seen = []

    def keep(_model, inputs, _named):
        if inputs[0].shape[-1] == 32:
            seen.append(inputs[0][: len(inputs[0]) // 2].clone())

    hook = pipe.unet.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        draw(pipe, **settings)
    finally:
        hook.remove()
    return seen


def test_regions_alone_change_between_two_steps_and_nothing_before(potter):
    without, drafted = (seen_by_unet(potter, draft=draft) for draft in (None, PLAIN))
    assert len(without) == len(drafted) == STEPS
    assert all(torch.equal(one, other) for one, other in zip(without[:2], drafted[:2], strict=True))
    differs = (without[2] != drafted[2]).any(dim=1)[0]
    inside = torch.zeros(16, 32, dtype=torch.bool)
    inside[:, :16] = inside[4:, 16:] = True
    assert torch.equal(differs, inside)


@pytest.mark.parametrize(("until", "step"), [(0.01, 1), (0.25, 1), (0.5, 2), (0.7, 3), (0.99, 3)])
def test_until_says_between_which_steps(potter, until, step):
    without = seen_by_unet(potter)
    drafted = seen_by_unet(potter, draft=Draft(steps=1, until=until, repeat_subject=False))
    assert [torch.equal(one, other) for one, other in zip(without, drafted, strict=True)] == [
        number < step for number in range(STEPS)
    ]


def test_what_is_put_in_is_the_region_drawn_alone(potter):
    """One pass on the region's own text and noise, its estimate made smaller, and fresh noise: computed here anew."""
    region = Region("a dog", box=(0, 0, 0.25, 0.5), negative_prompt="cat", guidance_scale=2.0)
    put_in = seen_by_unet(potter, regions=[region], draft=Draft(steps=1, repeat_subject=False))[2]

    noise = seeded()
    torch.randn(1, 4, 16, 32, generator=noise)  # the picture's own
    first = torch.randn(1, 4, 16, 16, generator=noise)
    scheduler = DDIMScheduler.from_config(potter.scheduler.config)
    potter.scheduler.set_timesteps(STEPS)
    start, at = potter.scheduler.timesteps[0], potter.scheduler.timesteps[2:3]
    text, without = potter.encode_prompt("a dog", potter.device, 1, True, "cat")
    with torch.no_grad():
        predicted = potter.unet(torch.cat([first] * 2), start, encoder_hidden_states=torch.cat([without, text])).sample
    guided = predicted[:1] + 2.0 * (predicted[1:] - predicted[:1])
    scheduler.set_timesteps(STEPS)
    clean = scheduler.step(guided, start, first).pred_original_sample
    small = functional.interpolate(clean, size=(8, 8), mode="bilinear", antialias=True)
    fresh = torch.randn(1, 4, 16, 32, generator=noise)
    expected = scheduler.add_noise(small, fresh[..., :8, :8], at)
    torch.testing.assert_close(put_in[..., :8, :8], expected, rtol=1e-4, atol=1e-4)


def ddim(pipe, noise, region, negative, guidance, timesteps):
    """Section 4.1 of DDIM without added noise: the estimate of the clean latent after the last of the timesteps."""
    text, without = pipe.encode_prompt(region.prompt, pipe.device, 1, True, negative)
    alphas = pipe.scheduler.alphas_cumprod
    noisy = clean = found = noise
    for number, timestep in enumerate(timesteps):
        if number:
            noisy = alphas[timestep] ** 0.5 * clean + (1 - alphas[timestep]) ** 0.5 * found
        with torch.no_grad():
            halves = [pipe.unet(noisy, timestep, encoder_hidden_states=one).sample for one in (without, text)]
        found = halves[0] + guidance * (halves[1] - halves[0])
        clean = (noisy - (1 - alphas[timestep]) ** 0.5 * found) / alphas[timestep] ** 0.5
    return clean


def test_drafts_of_several_steps_share_a_place_by_their_weights(potter):
    """Two soft regions on one another, one with texts of its own: put in where they hold mostly."""
    regions = [
        Region("a dog", box=(0, 0, 0.25, 0.5), feather=0.25, weight=0.5),
        Region("a cat", box=(0, 0, 0.25, 0.5), negative_prompt="bird", guidance_scale=1.5),
    ]
    draft = Draft(steps=3, until=0.75, repeat_subject=False)
    calls = {"regions": regions, "negative_prompt": "frog", "guidance_scale": 4.0}
    before, put_in = (seen_by_unet(potter, draft=one, **calls)[3] for one in (None, draft))

    noise = seeded()
    torch.randn(1, 4, 16, 32, generator=noise)  # the picture's own
    shares = region_weights(regions, 16, 32)
    potter.scheduler.set_timesteps(STEPS)
    first, last = int(potter.scheduler.timesteps[0]), int(potter.scheduler.timesteps[3])
    timesteps = [round(first - (first - last) * number / 3) for number in range(3)]
    clean = torch.zeros(1, 4, 16, 32)
    # What reaches beyond a box by its soft edge is the region's as well: 8 + 2 rows, 8 + 4 columns, in its shape.
    sizes = ((10, 12, 16, 20), (8, 8, 16, 16))
    starts = [torch.randn(1, 4, *size[2:], generator=noise) for size in sizes]
    settings = (("frog", 4.0), ("bird", 1.5))
    for region, share, size, start, (negative, guidance) in zip(regions, shares, sizes, starts, settings, strict=True):
        drawn = ddim(potter, start, region, negative, guidance, timesteps)
        small = functional.interpolate(drawn, size=size[:2], mode="bilinear", antialias=True)
        clean[..., : size[0], : size[1]] += share[: size[0], : size[1]] * small
    fresh, total = torch.randn(1, 4, 16, 32, generator=noise), shares.sum(dim=0)
    alpha = potter.scheduler.alphas_cumprod[last]
    noisy = alpha**0.5 * clean / total.clamp(min=0.5) + (1 - alpha) ** 0.5 * fresh
    torch.testing.assert_close(put_in, torch.where(total > 0.5, noisy, before), rtol=1e-4, atol=1e-4)
    assert len(total[(total > 0) & (total < 1)].unique()) > 3


def test_drafts_take_their_steps_on_the_way_to_where_the_call_goes_on(potter):
    passes = []

    def keep(_model, inputs, _named):
        if inputs[0].shape[-1] == 16:
            passes.append((len(inputs[0]), int(inputs[1])))

    hook = potter.unet.register_forward_pre_hook(keep, with_kwargs=True)
    halves = [LEFT, Region("a dog", box=(0.5, 0, 1, 1))]
    draw(potter, regions=halves, draft=Draft(steps=3))
    draw(potter, regions=halves, draft=Draft(steps=1), guidance_scale=1.0)
    hook.remove()
    potter.scheduler.set_timesteps(STEPS)
    first, last = int(potter.scheduler.timesteps[0]), int(potter.scheduler.timesteps[2])
    way = [first, round(first - (first - last) / 3), round(first - 2 * (first - last) / 3)]
    assert passes == [(4, timestep) for timestep in way] + [(2, first)]  # two drafts at once


def test_without_guidance_there_is_no_negative_half(potter):
    region = Region("a dog", box=(0, 0, 0.5, 1))
    drafted, without = (draw(potter, regions=[region], draft=draft, guidance_scale=1.0) for draft in (PLAIN, None))
    assert drafted.isfinite().all()
    assert not torch.equal(drafted, without)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_predictions_are_taken_apart_as_schedulers_do(kind):
    random = seeded()
    noisy, prediction = (torch.randn(1, 4, 8, 8, generator=random) for _ in range(2))
    scheduler = DDIMScheduler(prediction_type=kind, clip_sample=False)
    scheduler.set_timesteps(10)
    alpha = float(scheduler.alphas_cumprod[501])
    clean, noise = _split_prediction(noisy, prediction, alpha, kind)
    torch.testing.assert_close(clean, scheduler.step(prediction, 501, noisy).pred_original_sample)
    torch.testing.assert_close(alpha**0.5 * clean + (1 - alpha) ** 0.5 * noise, noisy)


def by_hand_from_there(pipe, settings):
    """Latents at the end of a fresh scheduler that begins with what was put in; one region is the whole picture."""
    scheduler = copy.deepcopy(pipe.scheduler)
    scheduler.set_timesteps(settings["num_inference_steps"])
    begin = settings["draft"].first_step_after(len(scheduler.timesteps), scheduler.order)
    put_in = seen_by_unet(pipe, prompt="one text", **settings)[begin + settings["draft"].steps]  # drafts are as large
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(begin)
    timesteps = scheduler.timesteps[begin:]
    latents = put_in / scheduler.scale_model_input(torch.ones(1), timesteps[0])
    text, without = pipe.encode_prompt("a dog", pipe.device, 1, True, "")
    noise = seeded()
    for _ in range(3 + begin):  # the picture's own, an ancestral scheduler's, the draft's, and the fresh noise
        torch.randn(1, 4, 16, 32, generator=noise)
    for timestep in timesteps:
        given = scheduler.scale_model_input(latents, timestep)
        with torch.no_grad():
            halves = [pipe.unet(given, timestep, encoder_hidden_states=one).sample for one in (without, text)]
        found = halves[0] + 3.0 * (halves[1] - halves[0])
        random = {"generator": noise} if "Ancestral" in type(scheduler).__name__ else {}
        latents = scheduler.step(found, timestep, latents, **random).prev_sample
        if isinstance(scheduler, PNDMScheduler):
            scheduler.counter = 2  # it would take its first step again, which a call's timesteps hold twice
    return latents


@pytest.mark.parametrize("until", [0.1, 0.5])
@pytest.mark.parametrize(
    "scheduler",
    [
        DDIMScheduler,
        PNDMScheduler,
        DEISMultistepScheduler,
        DPMSolverMultistepScheduler,
        DPMSolverSinglestepScheduler,
        UniPCMultistepScheduler,
        EulerDiscreteScheduler,
        EulerAncestralDiscreteScheduler,
        HeunDiscreteScheduler,
        KDPM2DiscreteScheduler,
        SASolverScheduler,
        LCMScheduler,
        TCDScheduler,
    ],
)
def test_latents_are_as_noisy_as_the_unet_is_told(pipe, scheduler, until):
    """A U-Net that predicts the noise of the call, or of the drafts, exactly: then none of it is left in the end."""
    pipe.scheduler = scheduler.from_config({**pipe.scheduler.config, "skip_prk_steps": True})
    told = []

    def predict(_unet, inputs, _named, _output):
        noisy, timestep = inputs[0], float(inputs[1])
        alphas = pipe.scheduler.alphas_cumprod
        low, part = int(timestep), timestep % 1
        alpha = float(alphas[low] ** (1 - part) * alphas[min(low + 1, len(alphas) - 1)] ** part)
        clean = 0.5  # in every cell, so that what else there is must be noise of this variance
        noise = (noisy - alpha**0.5 * clean) / (1 - alpha) ** 0.5
        told.append(float(noise[:, :, 1:-1, 1:-1].std()))
        return (noise,)

    hook = pipe.unet.register_forward_hook(predict, with_kwargs=True)
    everywhere = [Region("a dog", box=(0, 0, 1, 1))]
    drawn = draw(pipe, regions=everywhere, draft=Draft(until=until), num_inference_steps=8)
    hook.remove()
    assert 0.8 < min(told[-3:]) <= max(told[-3:]) < 1.2
    torch.testing.assert_close(drawn, torch.full_like(drawn, 0.5), rtol=0, atol=0.2)


@pytest.mark.parametrize(
    ("scheduler", "name"),
    [
        (LMSDiscreteScheduler, "LMSDiscreteScheduler"),
        (PNDMScheduler, "PNDMScheduler(skip_prk_steps=False)"),  # as it is by default
        (EDMEulerScheduler, "EDMEulerScheduler"),
    ],
    ids=["LMS", "PNDM", "EDM"],
)
def test_schedulers_that_cannot_go_on_are_refused_before_the_first_step(pipe, scheduler, name):
    if name.startswith("LMS"):
        pytest.importorskip("scipy")
    pipe.scheduler = scheduler()
    steps = []
    with pytest.raises(RegionError, match=re.escape(f"cannot be put between two steps of {name}. Leave `draft` out")):
        draw(pipe, regions=[RIGHT], draft=Draft(), callback_on_step_end=lambda *given: steps.append(given) or {})
    assert not steps


@pytest.mark.parametrize(
    "scheduler",
    [
        DDIMScheduler,
        PNDMScheduler,
        DPMSolverMultistepScheduler,
        UniPCMultistepScheduler,
        EulerDiscreteScheduler,
        EulerAncestralDiscreteScheduler,
        HeunDiscreteScheduler,
    ],
)
def test_every_scheduler_goes_on_as_if_it_began_there(pipe, scheduler):
    """The steps after the drafts do not depend on what schedulers remember of those before."""
    pipe.scheduler = scheduler.from_config({**pipe.scheduler.config, "skip_prk_steps": True})
    everywhere = [Region("a dog", box=(0, 0, 1, 1))]
    settings = {"regions": everywhere, "draft": PLAIN, "num_inference_steps": 6}
    first = draw(pipe, "one text", **settings)
    torch.testing.assert_close(first, by_hand_from_there(pipe, settings), rtol=1e-3, atol=1e-3)
    other = draw(pipe, "another text", latents=torch.full((1, 4, 16, 32), 0.5), **settings)
    assert first.isfinite().all()
    assert not torch.equal(first, draw(pipe, "one text", **{**settings, "draft": None}))
    # Given latents draw no random numbers, so that the drafts' noise differs; with a seed of its own it does not.
    again = draw(pipe, "another text", **settings)
    torch.testing.assert_close(first, again, rtol=1e-3, atol=1e-3)
    assert other.isfinite().all()


def test_a_picture_is_the_same_alone_and_in_a_batch(potter):
    both = [[LEFT, RIGHT], [Region("a cat", box=(0.25, 0, 0.75, 1))]]
    given = {"num_inference_steps": STEPS, "output_type": "latent", "height": 32, "width": 64, "guidance_scale": 3.0}
    together = potter(
        ["two friends", "a cat"],
        negative_prompt=["", "dog"],
        regions=both,
        generator=[seeded(3), seeded(4)],
        draft=PLAIN,
        **given,
    ).images
    for number, (prompt, negative) in enumerate((("two friends", ""), ("a cat", "dog"))):
        alone = potter(
            prompt,
            negative_prompt=negative,
            regions=both[number],
            generator=[seeded(3 + number)],
            draft=PLAIN,
            **given,
        ).images
        torch.testing.assert_close(together[number : number + 1], alone, rtol=1e-3, atol=1e-3)


def test_pictures_of_one_prompt_have_drafts_of_their_own(potter):
    one, other = draw(potter, num_images_per_prompt=2, draft=PLAIN, latents=torch.ones(2, 4, 16, 32))
    assert not torch.equal(one, other)


def test_a_region_that_does_not_hold_yet_has_no_draft(potter):
    late = Region("a dog", box=(0.5, 0, 1, 1), start=0.8)
    without, drafted = (seen_by_unet(potter, regions=[LEFT, late], draft=draft)[2] for draft in (None, PLAIN))
    assert torch.equal(without[..., 16:], drafted[..., 16:])
    assert not torch.equal(without[..., :16], drafted[..., :16])


def test_the_upper_of_two_regions_is_seen_where_both_are(potter):
    lower, upper = Region("a dog", box=(0, 0, 1, 1)), Region("a cat", box=(0, 0, 1, 1), order=1)
    both = draw(potter, regions=[lower, upper], draft=PLAIN)
    assert both.isfinite().all()
    changed = draw(potter, regions=[Region("a frog", box=(0, 0, 1, 1)), upper], draft=PLAIN)
    assert torch.equal(both, changed)


def test_callbacks_are_called_with_what_they_ask_for(potter):
    steps, given = [], []

    def theirs(_pipe, step, _timestep, tensors):
        steps.append(step)
        given.append(set(tensors))
        return tensors

    called = draw(
        potter, draft=PLAIN, callback_on_step_end=theirs, callback_on_step_end_tensor_inputs=["prompt_embeds"]
    )
    assert steps == list(range(STEPS))
    assert all(each >= {"prompt_embeds"} for each in given)
    assert torch.equal(called, draw(potter, draft=PLAIN))


def test_callbacks_of_diffusers_work(potter):
    cut = draw(potter, draft=PLAIN, callback_on_step_end=SDCFGCutoffCallback(cutoff_step_ratio=0.25))
    assert cut.isfinite().all()
    assert not torch.equal(cut, draw(potter, draft=PLAIN))


def test_what_a_callback_does_to_latents_is_kept(potter):
    def halve(_pipe, step, _timestep, tensors):
        return {"latents": tensors["latents"] / 2} if step == 1 else {}

    small = [Region("a dog", box=(0.25, 0.25, 0.5, 0.75))]
    seen = seen_by_unet(potter, regions=small, draft=PLAIN, callback_on_step_end=halve)[2]
    plain = seen_by_unet(potter, regions=small, draft=PLAIN)[2]
    torch.testing.assert_close(seen[..., 20:], plain[..., 20:] / 2)


def test_subjects_are_repeated_in_the_picture_and_said_once_in_drafts(potter, monkeypatch):
    texts = []
    encode = type(potter).encode_prompt

    def encoded(self, prompt, *rest, **named):
        texts.extend([prompt] if isinstance(prompt, str) else prompt)
        texts.extend(region.prompt for own in self._regions for region in own)
        return encode(self, prompt, *rest, **named)

    monkeypatch.setattr(type(potter), "encode_prompt", encoded)
    two = [LEFT, Region("the <potter>, in snow", box=(0.5, 0, 1, 1))]
    draw(potter, regions=two, draft=Draft(steps=1))
    assert texts == [
        "two friends",
        "a <potter> man and a <potter> man",
        "a <potter> man and a <potter> man, in snow",
        "a <potter>",
        "the <potter>, in snow",
    ]


@pytest.mark.parametrize(
    ("prompts", "expected"),
    [
        (["a <rex>, in a meadow"], ["a <rex>, in a meadow"]),
        (["a <rex>", "a dog"], ["a <rex>", "a dog"]),
        (["a <rex>", "<kit>"], ["a <rex> dog and a <rex> dog", "<kit> cat and <kit> cat"]),
        (
            ["photo of a <rex> dog on snow", "a <rex1>", "The <kit> and a <rex>"],
            [
                "photo of a <rex> dog, a <rex> dog and a <rex> dog on snow",
                "a <rex1>",
                "a <kit> cat, a <kit> cat and a <kit> cat and a <rex>",
            ],
        ),
        (["a <rex> doghouse", "a <kit>"], ["a <rex> dog and a <rex> dog doghouse", "a <kit> cat and a <kit> cat"]),
    ],
)
def test_subjects_are_repeated_for_every_region_that_has_one(prompts, expected):
    concepts = [Concept.from_name("rex", "dog"), Concept.from_name("kit", "cat")]
    regions = [Region(prompt, box=(0, 0, 1, 1), order=2) for prompt in prompts]
    repeated = repeat_subjects(regions, concepts)
    assert [region.prompt for region in repeated] == expected
    assert {region.order for region in repeated} == {2}


@pytest.mark.parametrize(
    ("box", "expected"),
    [
        ((4, 8, 12, 16), (4, 8, 8, 8, 16, 16)),  # square
        ((0, 10, 16, 14), (0, 4, 16, 16, 16, 16)),  # narrow: as wide as high
        ((4, 0, 12, 16), (4, 0, 8, 16, 16, 32)),  # wide: in its own shape
        ((6, 0, 10, 32), (0, 0, 16, 32, 16, 32)),  # wider than twice its height
        ((0, 0, 16, 4), (0, -6, 16, 16, 16, 16)),  # beyond the edge
        ((0, 0, 6, 7), (0, 0, 6, 7, 16, 20)),
    ],
)
def test_windows_surround_their_region(box, expected):
    top, left, bottom, right = box
    inside = torch.zeros(16, 32, dtype=torch.bool)
    inside[top:bottom, left:right] = True
    window = find_window(inside, 16, 4)
    assert (
        window.top, window.left, window.height, window.width, window.draft_height, window.draft_width
    ) == expected  # fmt: skip
    drafts = torch.ones(1, 1, window.draft_height, window.draft_width)
    placed = window.place(drafts, 16, 32)[0, 0] > 0
    assert placed.shape == inside.shape
    assert placed[inside].all() or expected[2] < bottom - top


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"steps": 0}, "steps are 0"),
        ({"steps": 1.5}, "steps are 1.5"),
        ({"steps": True}, "steps are True"),
        ({"until": 0}, "until is 0"),
        ({"until": 1.0}, "until is 1.0"),
        ({"until": "half"}, "until is 'half'"),
        ({"repeat_subject": 1}, "repeat_subject is 1"),
        ({"steps": 0, "until": 2}, "steps are 0.*until is 2"),
    ],
)
def test_impossible_drafts_are_refused(settings, words):
    with pytest.raises(RegionError, match=words):
        Draft(**settings)


@pytest.mark.parametrize("name", ["draft", "refine", "isolation"])
def test_switches_are_objects(potter, name):
    with pytest.raises(RegionError, match=rf"`{name}` is a bool; expected \w+\(...\) or None"):
        draw(potter, **{name: True})


def test_arguments_about_regions_without_any_are_told(potter):
    with pytest.warns(MixOfShowWarning) as told:
        potter(
            "a <potter>",
            isolation=Isolation(),
            draft=Draft(),
            refine=Refinement(),
            num_inference_steps=1,
            height=32,
            width=32,
        )
    assert [str(each.message) for each in told if each.category is MixOfShowWarning] == [
        "`refine` has no effect without regions.",
        "`isolation` and `draft` have no effect without regions.",
    ]


def test_a_call_of_one_step_tells_that_drafts_have_no_effect(potter):
    with pytest.warns(MixOfShowWarning, match="draft has no effect in a call of a single step"):
        draw(potter, num_inference_steps=1, draft=PLAIN)


def test_controlled_pipelines_have_drafts(pipe, make_pack):
    pictures = torch.rand(1, 3, 32, 64, generator=seeded())
    controlnet = tiny.controlnet(pipe.unet)
    pipe.load_edlora(make_pack("potter"))
    control = MixOfShowControlNetPipeline.from_pipe(pipe, controlnet=controlnet)
    adapter = MixOfShowAdapterPipeline.from_pipe(pipe, adapter=tiny.adapter())
    for pipe in (control, adapter):
        pipe.set_progress_bar_config(disable=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", MixOfShowWarning)
            drafted, without = (draw(pipe, image=pictures, draft=draft) for draft in (PLAIN, None))
        assert drafted.isfinite().all()
        assert not torch.equal(drafted, without)


@pytest.mark.parametrize("kind", [MixOfShowImg2ImgPipeline, MixOfShowInpaintPipeline])
def test_calls_that_begin_with_a_picture_have_no_drafts(potter, kind):
    pipe, picture = kind.from_pipe(potter), torch.rand(1, 3, 32, 64)
    given = {"image": picture} | ({"mask_image": picture[:, :1]} if kind is MixOfShowInpaintPipeline else {})
    with pytest.raises(RegionError, match="a call that begins with noise"):
        pipe("two friends", regions=[LEFT], draft=Draft(), **given)


@pytest.mark.parametrize(
    ("part", "change", "words"),
    [
        ("unet", {"in_channels": 9}, "takes a picture, or guidance, as an input"),
        ("unet", {"time_cond_proj_dim": 32}, "takes a picture, or guidance, as an input"),
        ("unet", {"encoder_hid_dim_type": "ip_image_proj"}, "pictures of an IP-Adapter"),
    ],
)
def test_models_that_need_more_than_a_text_are_refused(potter, part, change, words):
    getattr(potter, part).register_to_config(**change)
    with pytest.raises(RegionError, match=words):
        draw(potter, draft=Draft())


def test_the_pipeline_is_left_as_it_came(potter):
    scheduler, processors = potter.scheduler, dict(potter.unet.attn_processors)
    draw(potter, draft=PLAIN)
    assert potter.scheduler is scheduler
    assert all(potter.unet.attn_processors[name] is each for name, each in processors.items())
    assert not potter.unet._forward_pre_hooks
    assert torch.equal(draw(potter), draw(potter))


def test_refining_in_the_call_is_refining_after_it(potter):
    from diffusers_mixofshow import refine_regions

    regions = [
        Region("a <potter>", box=(0, 0, 0.3, 0.5)),
        Region("a dog", box=(0.5, 0.5, 0.8, 1), negative_prompt="cat"),
    ]
    given = {"num_inference_steps": STEPS, "height": 32, "width": 64, "guidance_scale": 3.0}
    settings = {"regions": regions, "negative_prompt": "frog", **given}
    inside = potter("two", generator=seeded(), refine=Refinement(strength=0.5, steps=4), **settings).images
    generator = seeded()
    plain = potter("two", generator=generator, **settings).images
    after = refine_regions(
        potter,
        plain,
        regions,
        strength=0.5,
        num_inference_steps=4,
        guidance_scale=3.0,
        negative_prompt="frog",
        generator=generator,
        batch_size=1,
    )
    assert inside[0].tobytes() == after[0].tobytes()
    assert inside[0].tobytes() != plain[0].tobytes()
    (as_tuple, _) = potter(
        "two", generator=seeded(), refine=Refinement(strength=0.5, steps=4), return_dict=False, **settings
    )
    assert as_tuple[0].tobytes() == inside[0].tobytes()


def test_refining_needs_pictures(potter):
    with pytest.raises(RegionError, match="`refine` needs pictures, but output_type is 'latent'"):
        draw(potter, refine=Refinement())


@pytest.mark.parametrize(
    ("settings", "call", "steps", "runs"),
    [
        ({}, 20, 10, 6),
        ({}, 50, 25, 15),
        ({}, 1, 2, 1),
        ({"strength": 0.2}, 4, 5, 1),
        ({"strength": 1.0}, 4, 2, 2),
        ({"steps": 8}, 20, 8, 4),
        ({"strength": 0.5, "steps": 2}, 20, 2, 1),
        ({"steps": 1, "strength": 1}, 20, 1, 1),
    ],
)
def test_refining_takes_half_the_steps_by_default(settings, call, steps, runs):
    refine = Refinement(**settings)
    assert (refine.choose_steps(call), refine.count_runs(call)) == (steps, runs)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"strength": 0}, "strength is 0;"),
        ({"strength": 1.1}, "strength is 1.1;"),
        ({"strength": "a"}, "strength is 'a';"),
        ({"steps": 0}, "steps are 0;"),
        ({"steps": 2.5}, "steps are 2.5;"),
        ({"strength": 0.4, "steps": 2}, "strength is 0.4 of 2 steps"),
    ],
)
def test_impossible_refinements_are_refused(settings, told):
    with pytest.raises(RegionError, match=re.escape(f"Refinement: its {told}")):
        Refinement(**settings)


def test_half_precision_draws_nearly_the_same(potter):
    """Noise and sums are in float32, so that the same picture is drawn as in float32."""
    settings = {"regions": [LEFT, RIGHT], "draft": PLAIN}
    full = seen_by_unet(potter, **settings)[2]
    potter.to(torch.bfloat16)
    half = seen_by_unet(potter, **settings)[2]
    assert half.dtype == torch.bfloat16
    inside = torch.zeros(16, 32, dtype=torch.bool)
    inside[:, :16] = inside[4:, 16:] = True
    difference = (half.float() - full)[..., inside].abs()
    assert difference.mean() < 0.05 * full[..., inside].abs().mean()


def test_a_model_with_a_height_and_a_width_of_its_own_drafts_at_the_smaller(potter):
    expected = draw(potter, draft=PLAIN)
    potter.unet.register_to_config(sample_size=(16, 24))
    assert torch.equal(draw(potter, draft=PLAIN), expected)


def test_a_good_draft_is_not_remarked_upon(potter):
    with warnings.catch_warnings():
        warnings.simplefilter("error", MixOfShowWarning)
        draw(potter, regions=[LEFT, Region("the <potter>", box=(0.6, 0, 1, 1))], draft=Draft())


def test_an_interrupted_call_is_not_told_that_it_has_a_single_step(potter):
    def interrupt(called, _step, _timestep, tensors):
        called._interrupt = True
        return tensors

    with warnings.catch_warnings():
        warnings.simplefilter("error", MixOfShowWarning)
        draw(potter, regions=[LEFT], draft=PLAIN, callback_on_step_end=interrupt)


@pytest.mark.parametrize("layers", ["one encoding", "a stack"])
def test_drafts_avoid_what_negative_embeddings_avoid(potter, layers):
    own = Region("a dog", box=RIGHT.box, negative_prompt="beard")
    texts = ["ugly", "blurred"]
    positive = ["a <potter>", "x"] if layers == "a stack" else ["x", "y"]
    _, negative = potter.encode_prompt(positive, potter.device, 1, True, texts)
    call = {"prompt": ["two", "others"], "draft": PLAIN, "height": 32, "width": 32, "num_images_per_prompt": 2}
    expected = draw(potter, regions=[LEFT, own], negative_prompt=texts, **call)
    found = draw(potter, regions=[LEFT, own], negative_prompt_embeds=negative, **call)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    other = draw(potter, regions=[LEFT, own], negative_prompt_embeds=-negative, **call)
    assert not torch.allclose(other, expected, atol=1e-3)
