"""Boxes and masks as weights on feature grids."""

import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_mixofshow.errors import RegionError
from diffusers_mixofshow.regions import Isolation, Layout, Region, feature_grids, region_weights
from diffusers_mixofshow.regions.weights import resolves


FULL = (0, 0, 1, 1)


def _mask(height=64, width=96):
    mask = np.zeros((height, width), dtype=bool)
    mask[: height // 2, width // 3 :] = True
    return mask


def test_a_box_holds_the_cells_whose_centres_it_contains():
    weights = region_weights([Region("a", box=(0.25, 0.5, 1.0, 1.0))], 4, 8)
    expected = torch.zeros(1, 4, 8)
    expected[0, 2:, 2:] = 1
    assert torch.equal(weights, expected)


def test_neighbours_share_no_cell_and_leave_no_gap():
    boxes = [(0, 0, 0.33, 1), (0.33, 0, 0.62, 1), (0.62, 0, 1, 1)]
    for size in (4, 5, 7, 8, 16, 64):
        weights = region_weights([Region("a", box=box) for box in boxes], size, size)
        assert set(weights.unique().tolist()) == {0, 1}
        assert torch.equal(weights.sum(0), torch.ones(size, size))


def test_overlaps_are_averaged():
    boxes = [(0, 0, 1, 1), (0.5, 0, 1, 1), (0.5, 0.5, 1, 1)]
    weights = region_weights([Region("a", box=box) for box in boxes], 4, 4)
    assert weights[:, 0, 0].tolist() == [1, 0, 0]
    assert weights[:, 0, 3].tolist() == [0.5, 0.5, 0]
    assert torch.allclose(weights[:, 3, 3], torch.full((3,), 1 / 3))


@pytest.mark.parametrize("box", [(0.5, 0, 0.501, 1), (0.999, 0, 1, 1), (0, 0, 0.001, 0.001), (0.3, 0.3, 0.301, 0.301)])
def test_a_thin_box_reaches_its_nearest_cells(box):
    for size in (1, 2, 3, 8):
        weights = region_weights([Region("a", box=box)], size, size)[0]
        rows, columns = weights.nonzero(as_tuple=True)
        assert len(columns.unique()) == 1
        assert abs((columns[0] + 0.5) / size - (box[0] + box[2]) / 2) <= 0.5 / size + 1e-6
        if box[3] == 1:
            assert len(rows) == size


def test_a_thin_mask_reaches_its_nearest_cells():
    mask = torch.zeros(64, 64)
    mask[:, 10] = 1
    weights = region_weights([Region("a", mask=mask)], 8, 8)[0]
    assert torch.equal(weights, torch.zeros(8, 8).index_fill(1, torch.tensor([1]), 1))


@pytest.mark.parametrize(
    "kind",
    [
        lambda mask: mask,
        lambda mask: mask.astype(np.uint8) * 255,
        lambda mask: mask.astype(np.uint8),
        lambda mask: mask.astype(np.float32),
        lambda mask: Image.fromarray(mask.astype(np.uint8) * 255),
        lambda mask: Image.fromarray(mask),
        lambda mask: torch.from_numpy(mask)[None, None],
        lambda mask: torch.from_numpy(mask).half(),
    ],
)
def test_a_mask_of_any_kind_and_size_is_like_its_box(kind):
    box = Region("a", box=(1 / 3, 0, 1, 0.5))
    for size in ((64, 96), (30, 30), (7, 200), (2, 3)):
        region = Region("a", mask=kind(_mask()))
        assert torch.equal(region_weights([region], 4, 6), region_weights([box], 4, 6))
        assert region_weights([region], *size).shape == (1, *size)


def test_no_region_has_no_weights():
    assert region_weights([], 3, 4).shape == (0, 3, 4)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, ["neither"]),
        ({"box": (0, 0, 1, 1), "mask": np.ones((2, 2))}, ["both"]),
        ({"box": (0, 0, 512, 512)}, ["leaves [0, 1]", "fractions"]),
        ({"box": (0.5, 0.7, 0.5, 0.2)}, ["left 0.5", "top 0.7"]),
        ({"box": (-0.1, 0.7, 0.5, 0.2), "negative_prompt": 3}, ["leaves", "top 0.7", "int"]),
        ({"box": (0, 1)}, ["2 values"]),
        ({"box": "left"}, ["'left'"]),
        ({"box": (float("nan"), 0, 1, 1)}, ["leaves"]),
        ({"mask": np.zeros((4, 4))}, ["no pixel"]),
        ({"mask": np.ones((4, 4, 3))}, ["(4, 4, 3)"]),
        ({"mask": np.full((4, 4), 255.0)}, ["255.0", "0 to 1"]),
        ({"mask": "mask.png"}, ["str"]),
        ({"mask": np.zeros((0, 4))}, ["(0, 4)"]),
        (
            {"box": FULL, "weight": -1, "feather": 2, "order": "top"},
            ["weight is -1", "feather is 2", "order is 'top'"],
        ),
        ({"box": FULL, "weight": 0.0}, ["no effect"]),
        ({"box": FULL, "start": 0.5, "end": 0.5}, ["never holds", "start 0.5"]),
        ({"box": FULL, "start": -0.1, "guidance_scale": float("nan")}, ["start is -0.1", "guidance_scale is nan"]),
        ({"box": FULL, "control_scale": float("inf"), "rounding": "up"}, ["control_scale is inf", "'up'", "inward"]),
        ({"box": FULL, "rounding": "inward", "feather": 0.1}, ["soft edge"]),
    ],
)
def test_every_defect_is_named_at_once(arguments, words):
    with pytest.raises(RegionError) as error:
        Region("a cat", **arguments)
    assert all(word in str(error.value) for word in ["a cat", *words])


def test_feature_grids_halve_and_round_up():
    assert feature_grids(64, 48) == {
        3072: (64, 48), 768: (32, 24), 192: (16, 12), 48: (8, 6), 12: (4, 3), 4: (2, 2), 1: (1, 1),
    }  # fmt: skip
    assert feature_grids(5, 1) == {5: (5, 1), 3: (3, 1), 2: (2, 1), 1: (1, 1)}


def test_weights_share_an_overlap_and_leave_the_rest_to_the_global_prompt():
    left = Region("a", box=(0, 0, 0.75, 1), weight=0.5)
    right = Region("b", box=(0.25, 0, 1, 1), weight=1.5)
    weights = region_weights([left, right], 1, 4, torch.float64)[:, 0]
    assert weights.tolist() == [[0.5, 0.25, 0.25, 0], [0, 0.75, 0.75, 1]]


def test_a_higher_order_lies_on_top():
    below = [Region("a", box=FULL), Region("b", box=FULL)]
    top = Region("c", box=(0.5, 0, 1, 1), order=1)
    veil = Region("d", box=(0.75, 0, 1, 1), order=2, weight=0.5)
    weights = region_weights([veil, *below, top], 1, 4)[:, 0]
    assert weights.T.tolist() == [[0, 0.5, 0.5, 0], [0, 0.5, 0.5, 0], [0, 0, 0, 1], [0.5, 0, 0, 0.5]]


def test_a_feather_is_a_straight_ramp_centred_on_the_edge():
    weights = region_weights([Region("a", box=(0.5, 0, 1, 1), feather=0.5)], 2, 8, torch.float64)[0]
    assert weights[0].tolist() == weights[1].tolist() == [0, 0, 0.125, 0.375, 0.625, 0.875, 1, 1]


def test_neighbours_with_one_feather_cross_fade():
    boxes = [(0, 0, 0.33, 1), (0.33, 0, 0.62, 1), (0.62, 0, 1, 1)]
    weights = region_weights([Region("a", box=box, feather=0.2) for box in boxes], 16, 16)
    assert torch.allclose(weights.sum(0), torch.ones(16, 16))
    assert len(weights.unique()) > 3


def test_a_soft_mask_is_like_its_soft_box():
    mask = torch.zeros(240, 240)
    mask[60:, :180] = 1
    soft = region_weights([Region("a", mask=mask, feather=0.2)], 8, 8)
    assert torch.allclose(soft, region_weights([Region("a", box=(0, 0.25, 0.75, 1), feather=0.2)], 8, 8), atol=0.03)
    sharp = region_weights([Region("a", mask=mask, feather=1e-4)], 8, 8)
    assert torch.equal(sharp, region_weights([Region("a", mask=mask)], 8, 8))


@pytest.mark.parametrize("feather", [0.01, 0.3])
def test_a_thin_soft_region_is_not_lost(feather):
    mask = torch.zeros(64, 64)
    mask[40, 41] = 1
    for region in (
        Region("a", box=(0.62, 0.62, 0.64, 0.64), feather=feather),
        Region("a", mask=mask, feather=feather),
    ):
        for size in (1, 2, 8):
            assert region_weights([region], size, size).sum() > 0


def test_rounding_inward_is_that_of_the_authors_code():
    box = (100 / 512, 0, 301 / 512, 1)
    mask = np.zeros((512, 512))
    mask[:, 100:301] = 1
    for region in (Region("a", box=box, rounding="inward"), Region("a", mask=mask, rounding="inward")):
        columns = [region_weights([region], size, size)[0, 0].nonzero()[:, 0].tolist() for size in (64, 16, 8, 2)]
        assert columns == [list(range(13, 37)), list(range(4, 9)), [2, 3], []]


def test_a_region_resolves_where_a_cell_is_its_own():
    thin = Region("a", box=(0.5, 0, 0.51, 1))
    assert not resolves(thin, 8, 8)
    assert resolves(thin, 256, 256)
    flat = Region("a", box=(0, 0.5, 1, 0.51))
    assert not resolves(flat, 8, 8)
    assert resolves(flat, 256, 256)
    inward = Region("a", box=(0.4, 0.4, 0.45, 0.45), rounding="inward")
    assert not resolves(inward, 16, 16)
    assert resolves(inward, 40, 40)
    dots = torch.zeros(64, 64)
    dots[::2, ::2] = 1
    assert resolves(Region("a", mask=dots), 64, 64)
    assert not resolves(Region("a", mask=dots), 32, 32)


def test_a_region_holds_for_whole_steps():
    early = Region("a", box=FULL, end=0.3)
    assert [early.holds(step, 10) for step in range(10)] == [True] * 3 + [False] * 7
    late = Region("a", box=FULL, start=0.5)
    assert [late.holds(step, 5) for step in range(5)] == [False] * 3 + [True] * 2


@pytest.mark.parametrize(
    "box",
    [[0, 0, 0.5, 1], np.array([0, 0, 0.5, 1]), torch.tensor([0, 0, 0.5, 1]), (edge for edge in (0, 0, 0.5, 1))],
    ids=["list", "array", "tensor", "generator"],
)
def test_a_box_of_any_kind_becomes_a_tuple_of_numbers(box, tmp_path):
    region = Region("a dog", box=box)
    assert region.box == (0, 0, 0.5, 1)
    assert {type(edge) for edge in region.box} <= {int, float}
    assert Layout.load(Layout([region]).save(tmp_path / "layout.json")).regions[0].box == region.box


@pytest.mark.parametrize("box", ["0011", ["0", "0", "0.5", "1"]])
def test_a_box_of_texts_is_refused(box):
    with pytest.raises(RegionError, match="of texts; expected"):
        Region("a dog", box=box)


@pytest.mark.parametrize("scales", [4, "4", (), (3,), [0], None.__class__])
def test_isolation_on_no_scales_is_refused(scales):
    with pytest.raises(RegionError, match="expected powers of two"):
        Isolation(scales=scales)
