"""Inpainting of the neighbourhood of a mask: regions stay where they are on the picture."""

import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_mixofshow import Layout, MixOfShowInpaintPipeline, Region
from diffusers_mixofshow.errors import ConceptError, MixOfShowWarning, RegionError
from diffusers_mixofshow.regions.cropping import Crop


PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 96, 3), dtype=np.uint8))
# Of 96 x 64 pixels, x 32 to 80 and y 16 to 48; with a padding of 0 that is the crop.
CROP = (32, 16, 80, 48)
HOLE = Image.new("L", (96, 64))
HOLE.paste(255, CROP)


def _mask(left, top, right, bottom, size=(96, 64)):
    mask = np.zeros(size[::-1], np.uint8)
    mask[top:bottom, left:right] = 255
    return mask


@pytest.fixture
def inpaint(pipe, make_pack):
    pipe.load_edlora(make_pack("potter"))
    made = MixOfShowInpaintPipeline.from_pipe(pipe)
    made.set_progress_bar_config(disable=True)
    return made


def _latents(pipe, regions, image=PICTURE, mask=HOLE, size=(48, 32), prompt="a dog", **settings):
    """What the U-Net has drawn, before anything is pasted into the picture."""
    seen = []

    def note(_pipe, _step, _time, tensors):
        seen.append(tensors["latents"].clone())
        return tensors

    pipe(
        prompt,
        image=image,
        mask_image=mask,
        regions=regions,
        width=size[0],
        height=size[1],
        num_inference_steps=2,
        strength=1.0,
        generator=torch.Generator().manual_seed(0),
        callback_on_step_end=note,
        **settings,
    )
    return seen[-1]


# On the picture, and on the crop by hand. Twelfths of the picture's width are eight pixels, a sixth of the crop's.
HALF = (0, 0, 0.5, 1)
INSIDE = {
    "a box inside": ({"box": (5 / 12, 0.25, 8 / 12, 0.5)}, {"box": (1 / 6, 0, 4 / 6, 0.5)}),
    "a box over the edge": ({"box": (0, 0.5, 7 / 12, 1)}, {"box": (0, 0.5, 0.5, 1)}),
    "the whole picture": ({"box": (0, 0, 1, 1)}, {"box": (0, 0, 1, 1)}),
    "exactly the crop": ({"box": (4 / 12, 0.25, 10 / 12, 0.75)}, {"box": (0, 0, 1, 1)}),
    "a mask": ({"mask": _mask(40, 16, 56, 32)}, {"mask": _mask(8, 0, 24, 16, (48, 32))}),
    "a smaller mask": ({"mask": _mask(5, 2, 7, 4, (12, 8))}, {"mask": _mask(8, 0, 24, 16, (48, 32))}),
    "a mask as a picture": ({"mask": Image.fromarray(_mask(40, 16, 56, 32))}, {"mask": _mask(8, 0, 24, 16, (48, 32))}),
    "a mask as a tensor": (
        {"mask": torch.tensor(_mask(0, 0, 56, 64)) / 255},
        {"mask": _mask(0, 0, 24, 32, (48, 32))},
    ),
    "settings": (
        {"box": (0, 0, 7 / 12, 1), "weight": 0.5, "negative_prompt": "hat", "guidance_scale": 2.0, "end": 0.5},
        {"box": HALF, "weight": 0.5, "negative_prompt": "hat", "guidance_scale": 2.0, "end": 0.5},
    ),
    "a soft edge": ({"box": (0, 0, 7 / 12, 1), "feather": 0.125}, {"box": HALF, "feather": 0.25}),
    "a soft mask": (
        {"mask": _mask(0, 0, 56, 64), "feather": 1 / 8},
        {"mask": _mask(0, 0, 24, 32, (48, 32)), "feather": 1 / 4},
    ),
}


@pytest.mark.parametrize(("on_picture", "on_crop"), INSIDE.values(), ids=INSIDE)
def test_regions_move_into_the_crop(inpaint, on_picture, on_crop):
    found = _latents(inpaint, [Region("a <potter>", **on_picture)], padding_mask_crop=0)
    by_hand = {"image": PICTURE.crop(CROP), "mask": HOLE.crop(CROP)}
    expected = _latents(inpaint, [Region("a <potter>", **on_crop)], **by_hand)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(found, _latents(inpaint, None, **by_hand), atol=1e-3)


ALL = [Region("a <potter>", box=(0, 0, 7 / 12, 1)), Region("a cat", box=(7 / 12, 0.25, 1, 0.5))]
ON_CROP = [Region("a <potter>", box=HALF), Region("a cat", box=(0.5, 0, 1, 0.5))]
AWAY = Region("a house", box=(0, 0, 0.25, 1))


@pytest.mark.parametrize(
    ("regions", "on_crop", "prompt"),
    [
        (Layout(tuple(ALL)), ON_CROP, "a dog"),
        ([ALL, [AWAY, ALL[1]]], [ON_CROP, [ON_CROP[1]]], ["a dog", "x"]),
        ([None, Layout(tuple(ALL))], [None, ON_CROP], ["a dog", "x"]),
        ([[AWAY], ALL], [[], ON_CROP], ["a dog", "x"]),
    ],
    ids=["layout", "one misses", "only the second", "all of the first miss"],
)
def test_layouts_and_lists_for_each_prompt_move_too(inpaint, regions, on_crop, prompt):
    noise = torch.randn(2 if isinstance(prompt, list) else 1, 4, 16, 24, generator=torch.Generator().manual_seed(1))
    found = _latents(inpaint, regions, prompt=prompt, latents=noise, padding_mask_crop=0)
    by_hand = {"image": PICTURE.crop(CROP), "mask": HOLE.crop(CROP)}
    torch.testing.assert_close(
        found, _latents(inpaint, on_crop, prompt=prompt, latents=noise, **by_hand), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize(
    "away",
    [
        {"box": (0, 0, 4 / 12, 1)},
        {"box": (10 / 12, 0, 1, 1)},
        {"box": (0, 0.75, 1, 1)},
        {"box": (0, 0, 0.2, 1), "feather": 0.1},
        {"mask": _mask(0, 0, 32, 64)},
        {"mask": _mask(0, 0, 1, 8, (12, 8))},
    ],
    ids=["left", "right", "below", "soft", "mask", "smaller mask"],
)
def test_a_region_that_misses_the_crop_has_no_effect_and_is_told(inpaint, away):
    plain = _latents(inpaint, None, padding_mask_crop=0)
    with pytest.warns(MixOfShowWarning, match="'a house' outside of what padding_mask_crop draws"):
        assert torch.equal(_latents(inpaint, [Region("a house", **away)], padding_mask_crop=0), plain)
    kept = _latents(inpaint, ALL, padding_mask_crop=0)
    with pytest.warns(MixOfShowWarning, match="region 'a house' outside"):
        assert torch.equal(_latents(inpaint, [*ALL, Region("a house", **away)], padding_mask_crop=0), kept)


def test_a_region_that_misses_the_crop_is_checked_as_any_other(inpaint):
    with pytest.raises(ConceptError, match="<nobody>"):
        _latents(inpaint, [Region("a <nobody>", box=AWAY.box)], padding_mask_crop=0)
    with pytest.raises(RegionError, match="dict"):
        _latents(inpaint, [{"prompt": "x"}], padding_mask_crop=0)


def test_without_a_crop_regions_are_parts_of_the_canvas(inpaint):
    with warnings.catch_warnings():
        warnings.simplefilter("error", MixOfShowWarning)
        _latents(inpaint, [Region("a <potter>", box=HALF)])


def test_what_cannot_be_cropped_is_the_parents_complaint(inpaint):
    with pytest.raises(ValueError, match="should be a PIL image when inpainting mask crop"):
        _latents(inpaint, ALL, image=torch.zeros(1, 3, 64, 96), padding_mask_crop=0)


@pytest.mark.parametrize("canvas", [(48, 32), (64, 64), (96, 32), (40, 56), (32, 80)])
@pytest.mark.parametrize("box", [CROP, (0, 0, 96, 64), (10, 0, 40, 64), (0, 20, 96, 31)])
def test_a_region_stands_where_diffusers_puts_its_pixels(canvas, box):
    """A picture that is white where the region is, cropped and enlarged by diffusers, is white where the region is."""
    from diffusers.image_processor import VaeImageProcessor

    white = np.zeros((64, 96, 3), np.uint8)
    white[24:40, 16:64] = 255
    processor = VaeImageProcessor(vae_scale_factor=8, do_normalize=False, resample="nearest")
    pixels = processor.preprocess(
        Image.fromarray(white), height=canvas[1], width=canvas[0], crops_coords=box, resize_mode="fill"
    )[0, 0]
    crop = Crop(box=box, picture=(96, 64), canvas=canvas)
    mask = crop.move(Region("x", mask=white[..., 0])).mask
    left, top, right, bottom = crop.move(Region("x", box=(16 / 96, 24 / 64, 64 / 96, 40 / 64))).box
    rows, columns = torch.arange(canvas[1]) + 0.5, torch.arange(canvas[0]) + 0.5
    inside_rows = (rows >= top * canvas[1]) & (rows < bottom * canvas[1])
    inside_columns = (columns >= left * canvas[0]) & (columns < right * canvas[0])
    for found in (mask, inside_rows[:, None] & inside_columns[None]):
        # diffusers rounds which pixel it takes; a line of pixels along the edge may differ.
        assert (found != (pixels > 0.5)).float().mean() <= 0.05
