"""Regions drawn anew at a higher resolution."""

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from PIL import Image

import tiny
from diffusers_mixofshow.errors import RegionError
from diffusers_mixofshow.pipelines import MixOfShowImg2ImgPipeline, MixOfShowInpaintPipeline, refine_regions, refining
from diffusers_mixofshow.regions import Refinement, Region


SMALL = Region("a <potter>", box=(0.25, 0.25, 0.5, 0.75), negative_prompt="beard")
ALIKE = Region("a dog", box=(0.6, 0.25, 0.85, 0.75))
CALL = {"size": 32, "num_inference_steps": 3, "strength": 0.7}


@pytest.fixture
def potter(pipe, make_pack):
    """The pipeline with one concept."""
    pipe.load_edlora(make_pack("potter"))
    return pipe


@pytest.fixture
def images():
    random = np.random.default_rng(0)
    return [Image.fromarray(random.integers(0, 255, (32, 40, 3), dtype=np.uint8)) for _ in range(2)]


def _refine(pipe, images, regions, **settings):
    return refine_regions(pipe, images, regions, generator=torch.Generator().manual_seed(0), **{**CALL, **settings})


def test_a_region_is_drawn_anew_and_the_rest_stays(potter, images):
    before = [np.asarray(image).copy() for image in images]
    results = _refine(potter, images, [SMALL], feather=0.05)
    assert all(np.array_equal(np.asarray(image), old) for image, old in zip(images, before, strict=True))
    for result, old in zip(results, before, strict=True):
        changed = (np.asarray(result) != old).any(axis=-1)
        assert changed[10:22, 12:18].mean() > 0.9
        assert not changed[:6].any()
        assert not changed[:, 24:].any()


def test_its_own_prompts_are_used(potter, images):
    first = _refine(potter, images[:1], [SMALL])
    for other in (
        Region("a dog", box=SMALL.box, negative_prompt="beard"),
        Region("a <potter>", box=SMALL.box, negative_prompt="hat"),
    ):
        assert not np.array_equal(np.asarray(_refine(potter, images[:1], [other])[0]), np.asarray(first[0]))
    plain = Region("a <potter>", box=SMALL.box)
    again = _refine(potter, images[:1], [plain], negative_prompt="beard")
    assert np.array_equal(np.asarray(again[0]), np.asarray(first[0]))


@pytest.mark.parametrize("off", [True, False])
def test_bars_are_shown_as_the_pipeline_has_been_told(potter, images, capsys, off):
    potter.set_progress_bar_config(disable=off)
    capsys.readouterr()
    _refine(potter, images, [SMALL])
    assert (capsys.readouterr().err == "") is off


def test_regions_of_one_size_are_one_pass(potter, images, monkeypatch):
    sizes = []
    call = refining._ImageToImage.__call__

    def counted(self, prompt, **settings):
        sizes.append((len(prompt), settings["image"][0].size))
        return call(self, prompt, **settings)

    monkeypatch.setattr(refining._ImageToImage, "__call__", counted)
    _refine(potter, images, [SMALL, ALIKE])
    wide = Region("wide", box=(0.1, 0.4, 0.9, 0.6))
    _refine(potter, images, [SMALL, ALIKE, wide], batch_size=3)
    assert [count for count, _ in sizes] == [4, 3, 1, 2]
    assert all(width % 8 == height % 8 == 0 for _, (width, height) in sizes)


def test_large_regions_are_left_as_they_are(potter, images):
    everything = Region("all", box=(0, 0, 1, 1))
    (result,) = _refine(potter, images[:1], [everything])
    assert np.array_equal(np.asarray(result), np.asarray(images[0]))


def test_the_pipeline_is_not_changed(potter, images):
    processors, config = dict(potter.unet.attn_processors), dict(potter.config)
    _refine(potter, images[:1], [SMALL])
    assert all(potter.unet.attn_processors[name] is processor for name, processor in processors.items())
    assert dict(potter.config) == config
    assert list(potter.concepts) == ["<potter>"]


def test_every_defect_is_named_at_once(potter):
    with pytest.raises(RegionError, match=r"a str is no picture.*a dict is no Region"):
        _refine(potter, ["photo.png"], [{}])


def _by_hand(pipe, image, below, region, noise, *, size=32, margin=0.0, feather=0.05, **call):
    """Crop with a margin, no narrower than high, enlarge to size x size in area, draw anew, paste with a soft edge."""
    pixels, (width, height) = np.asarray(image), image.size
    reached = np.argwhere(_soft_box(region.box, region.feather or 1e-9, height, width) > 0)  # soft edge included
    (top, left), (bottom, right) = reached.min(axis=0), reached.max(axis=0) + 1
    tall = round((1 + 2 * margin) * (bottom - top))
    wide = max(tall, round((1 + 2 * margin) * (right - left)))
    top, left = (top + bottom - tall) // 2, (left + right - wide) // 2
    rows, columns = np.arange(top, top + tall), np.arange(left, left + wide)
    crop = Image.fromarray(pixels[rows.clip(0, height - 1)][:, columns.clip(0, width - 1)])
    scale = size / (tall * wide) ** 0.5
    large = tuple(8 * round(side * scale / 8) for side in (wide, tall))
    redraw = MixOfShowImg2ImgPipeline.from_pipe(pipe)
    drawn = redraw(region.prompt, image=crop.resize(large), generator=noise, **call).images[0]
    small = np.asarray(drawn.resize((wide, tall), Image.Resampling.LANCZOS)).astype(float)
    result = np.asarray(below).astype(float)
    share = _soft_box(region.box, max(feather, region.feather), height, width)[..., None]
    here = np.ix_(rows[(rows >= 0) & (rows < height)], columns[(columns >= 0) & (columns < width)])
    own = small[here[0] - top, here[1] - left]
    result[here] = share[here] * own + (1 - share[here]) * result[here]
    return Image.fromarray(result.round().astype(np.uint8))


def _soft_box(box, feather, height, width):
    """Part of a window of the feather's size around each pixel that is in the box; it goes on beyond the picture."""

    def along(low, high, cells):
        low, high = low if low > 0 else -9, high if high < 1 else 9
        middles = (np.arange(cells) + 0.5) / cells
        covered = np.minimum(middles + feather / 2, high) - np.maximum(middles - feather / 2, low)
        return (covered / feather).clip(0, 1)

    left, top, right, bottom = box
    return along(top, bottom, height)[:, None] * along(left, right, width)[None]


UPPER = Region("a dog", box=(0.3, 0.5, 0.6, 1), order=1, feather=0.2)
WIDE = Region("a cat", box=(0, 0.5, 0.5, 0.75))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"size": 48, "margin": 0.25, "feather": 0.2},
        {"strength": 0.4, "num_inference_steps": 5, "guidance_scale": 2.0},
    ],
    ids=["usual", "patch", "call"],
)
def test_every_setting_does_what_it_says(potter, images, settings):
    call = {"num_inference_steps": 2, "strength": 0.6, **settings}
    negatives, noises = ["hat", "beak"], [torch.Generator().manual_seed(seed) for seed in (5, 6)]
    found = refine_regions(
        potter, images, [[UPPER, SMALL], [WIDE]], generator=noises, negative_prompt=negatives, batch_size=1, **call
    )
    for number, own in enumerate([[SMALL, UPPER], [WIDE]]):  # the upper one is pasted last
        noise, wanted = torch.Generator().manual_seed(5 + number), images[number]
        for region in own:
            negative = negatives[number] if region.negative_prompt is None else region.negative_prompt
            wanted = _by_hand(potter, images[number], wanted, region, noise, negative_prompt=negative, **call)
        difference, change = (
            np.abs(np.asarray(one).astype(int) - np.asarray(wanted)) for one in (found[number], images[number])
        )
        assert difference.max() <= 2
        assert change.max() > 50


def test_without_regions_pictures_come_back_as_they_are(potter, images):
    for regions in ([], [[], []]):
        found = _refine(potter, images, regions)
        assert [one.tobytes() for one in found] == [image.tobytes() for image in images]
        assert all(one is not image for one, image in zip(found, images, strict=True))
    with pytest.raises(RegionError, match="1 lists of regions for 2 pictures"):
        _refine(potter, images, [[SMALL]])


IN_CALL = {"height": 32, "width": 32, "num_inference_steps": 3, "guidance_scale": 3.0}
CORNER = Region("a dog", box=(0, 0, 0.5, 0.5))


def _draw(pipe, refine=None, **settings):
    """The picture of a call, as whole numbers."""
    generator = torch.Generator().manual_seed(0)
    settings = {**IN_CALL, "regions": [CORNER], **settings}
    return np.asarray(pipe("two dogs", refine=refine, generator=generator, **settings).images[0]).astype(int)


def _count_passes(pipe):
    """A list of the sizes of the batches that the U-Net has been given."""
    seen = []
    pipe.unet.register_forward_pre_hook(lambda _unet, inputs: seen.append(len(inputs[0])))
    return seen


@pytest.mark.parametrize("kind", [Image.Image, np.ndarray, torch.Tensor])
@pytest.mark.parametrize("padding", [None, 4])
def test_what_an_inpainting_mask_protects_is_not_redrawn(pipe, images, kind, padding):
    pipe = MixOfShowInpaintPipeline.from_pipe(pipe)
    photo, mask = images[0].resize((32, 32)), np.zeros((32, 32), dtype=np.uint8)
    mask[:, :8] = 255
    if padding and kind is not Image.Image:
        pytest.skip("diffusers crops pictures alone")
    given = {"image": photo, "mask_image": Image.fromarray(mask), "padding_mask_crop": padding, "strength": 0.9}
    if kind is not Image.Image:
        given["image"] = torch.tensor(np.asarray(photo)).permute(2, 0, 1)[None] / 127.5 - 1
        given["mask_image"] = mask[None] / 255 if kind is np.ndarray else torch.tensor(mask)[None] / 255
    plain, refined = (_draw(pipe, refine, **given) for refine in (None, Refinement()))
    changed = (plain != refined).any(axis=-1)
    assert changed[:14, :8].any()
    assert not changed[:, 8:].any()


def test_an_inpainting_unet_is_refused_before_the_first_step(pipe, images):
    pipe = MixOfShowInpaintPipeline.from_pipe(pipe)
    pipe.unet.register_to_config(in_channels=9)
    passes = _count_passes(pipe)
    with pytest.raises(RegionError, match="a latent alone, of 4 channels; this one takes 9"):
        _draw(pipe, Refinement(), image=images[0], mask_image=Image.new("L", images[0].size, 255))
    with pytest.raises(RegionError, match="Leave `refine` out"):
        _refine(pipe, images, [CORNER])
    assert not passes


def test_pictures_of_an_ip_adapter_are_seen_by_refining_too(pipe):
    tiny.add_ip_adapter(pipe.unet)
    plain, refined = (
        _draw(pipe, refine, ip_adapter_image_embeds=[torch.ones(2, 1, 8)]) for refine in (None, Refinement())
    )
    other = _draw(pipe, Refinement(), ip_adapter_image_embeds=[-torch.ones(2, 1, 8)])
    assert (plain != refined).any()
    assert (other != refined).any()


def test_a_region_is_redrawn_with_guidance_of_its_own(pipe, images):
    own, other_region = (Region("a dog", box=SMALL.box, guidance_scale=scale) for scale in (9.0, None))
    found, expected, other = (
        np.asarray(_refine(pipe, images[:1], [region], guidance_scale=guidance)[0])
        for region, guidance in ((own, 3.0), (other_region, 9.0), (other_region, 3.0))
    )
    assert np.array_equal(found, expected)
    assert not np.array_equal(found, other)


def test_refining_avoids_what_negative_embeddings_avoid(pipe):
    own = Region("a cat", box=(0.6, 0.5, 1, 1), negative_prompt="beard")
    _, negative = pipe.encode_prompt("a", pipe.device, 1, True, "ugly")
    expected, found, other = (
        _draw(pipe, Refinement(), regions=[CORNER, own], **given).astype(int)
        for given in (
            {"negative_prompt": "ugly"},
            {"negative_prompt_embeds": negative},
            {"negative_prompt_embeds": -negative},
        )
    )
    assert abs(found - expected).max() <= 1
    assert abs(other - expected).max() > 3


@pytest.mark.parametrize("kind", ["list", "tensor"])
def test_patches_see_their_parts_of_the_masks_of_an_ip_adapter(pipe, images, kind):
    tiny.add_ip_adapter(pipe.unet)
    left, corner = Region("a dog", box=(0.25, 0.25, 0.5, 0.75)), Region("a dog", box=(0.8, 0, 1, 0.25))
    whole, half = torch.zeros(1, 1, 64, 80), torch.zeros(1, 1, 32, 32)
    whole[..., 16:48, 14:30] = 1  # the patch around `left` is 32 cells wide from 14 on: its left half
    half[..., :16] = 1
    shown = 20 * torch.randn(2, 1, 8, generator=torch.Generator().manual_seed(0))

    def masked(mask, **arguments):
        masks = {"ip_adapter_masks": [mask] if kind == "list" else mask}
        return {"ip_adapter_image_embeds": [shown], "cross_attention_kwargs": masks, **arguments}

    call = {"num_inference_steps": 2, "strength": 0.7, "size": 32}
    noises = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
    found = refine_regions(pipe, images, [left, corner], generator=noises, **masked(whole), **call)
    for number, image in enumerate(images):
        noise, wanted = torch.Generator().manual_seed(5 + number), image
        for region, mask in ((left, half), (corner, torch.zeros(1, 1, 32, 32))):
            wanted = _by_hand(pipe, image, wanted, region, noise, **masked(mask, **call))
        assert np.abs(np.asarray(found[number]).astype(int) - np.asarray(wanted)).max() <= 2
    noises = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
    other = refine_regions(pipe, images, [left, corner], generator=noises, **masked(1 - whole), **call)
    assert np.abs(np.asarray(found[0]).astype(int) - np.asarray(other[0])).max() > 5


def test_refining_takes_half_the_steps_of_given_timesteps(pipe):
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    passes = _count_passes(pipe)
    _draw(pipe, Refinement(strength=1.0), timesteps=[900, 700, 500, 400, 200, 1])
    assert len(passes) == 6 + 3
