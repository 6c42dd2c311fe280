"""Regional attention against the equations of section 3.4, written out position by position, in float64."""

import math

import numpy as np
import pytest
import torch


pytest.importorskip("hypothesis", reason="part of the extra 'dev'")

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import tiny
from diffusers_mixofshow.conditioning.attention import RegionPlan, layerwise_attention, regional_attention
from diffusers_mixofshow.families.layers import cross_attention_layers
from diffusers_mixofshow.regions import Region


TOKENS, WIDTH = 77, 32


@pytest.fixture(scope="module")
def double_unet():
    return tiny.components()["unet"].double()


def attention_at(layer, query_row, text):
    """Attn(Q(z), K(P), V(P)) at one position: `query_row` (channels,), `text` (tokens, dim)."""
    query, keys, values = layer.to_q(query_row), layer.to_k(text), layer.to_v(text)
    size = len(query) // layer.heads
    heads = []
    for start in range(0, len(query), size):
        part = slice(start, start + size)
        scores = torch.softmax(keys[:, part] @ query[part] / math.sqrt(size), dim=0)
        heads.append(scores @ values[:, part])
    return layer.to_out[0](torch.cat(heads))


def is_inside(region, row, column, rows, columns):
    """Whether a cell of the feature map is the region's; masks here are finer than the map by a whole factor."""
    if region.box is not None:
        left, top, right, bottom = region.box
        return left <= (column + 0.5) / columns < right and top <= (row + 0.5) / rows < bottom
    height, width = region.mask.shape
    cell = region.mask[
        row * height // rows : (row + 1) * height // rows, column * width // columns : (column + 1) * width // columns
    ]
    return 2 * int(cell.sum()) >= cell.size


def shares_of(regions, row, column, rows, columns):
    """Weight of each context in a cell, the global prompt first: the highest order takes its part of what is left."""
    shares, left = [0.0] * (1 + len(regions)), 1.0
    for order in sorted({region.order for region in regions}, reverse=True):
        level = [
            number
            for number, region in enumerate(regions)
            if region.order == order and is_inside(region, row, column, rows, columns)
        ]
        total = max(1.0, sum(regions[number].weight for number in level))
        for number in level:
            shares[1 + number] = left * regions[number].weight / total
        left -= sum(shares[1 + number] for number in level)
    shares[0] = left
    return shares


def expected_output(layer, hidden, contexts, regions, grid):
    """One attention for each position and context, weighed and summed; `regions` are those of each picture."""
    rows, columns = grid
    output = torch.zeros_like(hidden)
    for picture in range(len(hidden)):
        for position in range(rows * columns):
            shares = shares_of(regions[picture], position // columns, position % columns, rows, columns)
            for context, share in enumerate(shares):
                if share > 1e-12:
                    text = contexts[context][picture]
                    output[picture, position] += share * attention_at(layer, hidden[picture, position], text)
    return output


@st.composite
def boxes(draw):
    """A box, at least three tenths wide and high."""
    left, top = draw(st.floats(0, 0.6)), draw(st.floats(0, 0.6))
    return (left, top, draw(st.floats(left + 0.3, 1)), draw(st.floats(top + 0.3, 1)))


@st.composite
def masks(draw, grid):
    """Pixels by chance, three by three to a cell of the feature map, the first cell inside."""
    chance = np.random.default_rng(draw(st.integers(0, 10**6)))
    mask = chance.random((grid[0] * 3, grid[1] * 3)) < draw(st.floats(0, 1))
    mask[:3, :3] = True
    return mask


@st.composite
def layouts(draw, grid):
    """Up to four boxes and masks that may overlap, each on at least one cell of the feature map, plain or weighed."""
    plain, (rows, columns) = draw(st.booleans()), grid
    regions = []
    for number in range(draw(st.integers(1, 4))):
        place = draw(st.one_of(st.fixed_dictionaries({"box": boxes()}), st.fixed_dictionaries({"mask": masks(grid)})))
        weight, order = (1.0, 0) if plain else (draw(st.sampled_from([0.3, 1.0, 2.0])), draw(st.integers(0, 1)))
        region = Region(f"region {number}", **place, weight=weight, order=order)
        if any(is_inside(region, row, column, rows, columns) for row in range(rows) for column in range(columns)):
            regions.append(region)
    return regions


@st.composite
def calls(draw):
    """Size of the latent, the regions of each picture or of all, rows of the batch, and how attention is computed."""
    size = draw(st.sampled_from([(8, 8), (12, 8), (6, 10), (4, 16)]))
    grid = (size[0] // 2, size[1] // 2)
    regions = [draw(layouts(grid)) for _ in range(draw(st.integers(1, 2)))]
    guided = draw(st.booleans())
    pictures = len(regions) if len(regions) > 1 else draw(st.integers(1, 2))
    return {
        "size": size,
        "regions": regions,
        "batch": pictures * (2 if guided else 1),  # guidance: its unconditional half comes first
        "layerwise": draw(st.booleans()),
        "sliced": draw(st.booleans()),
        "seed": draw(st.integers(0, 10**6)),
    }


def attention_calls(unet, run):
    """What every cross-attention layer was given and gave, layer by layer."""
    calls = {}
    hooks = [
        unet.get_submodule(path).register_forward_hook(
            lambda _layer, inputs, output, path=path: calls.__setitem__(path, (inputs[0], output))
        )
        for path in cross_attention_layers(unet)
    ]
    try:
        with torch.no_grad():
            run()
    finally:
        for hook in hooks:
            hook.remove()
    return calls


@settings(max_examples=20, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(call=calls())
def test_random_layouts_are_the_equations(double_unet, call):
    torch.manual_seed(call["seed"])
    size, regions, batch = call["size"], call["regions"], call["batch"]
    paths = cross_attention_layers(double_unet)
    plans = [RegionPlan(own) for own in regions]
    layers = len(paths) if call["layerwise"] else 1
    contexts = torch.randn(batch, max(plan.contexts for plan in plans), layers, TOKENS, WIDTH, dtype=torch.float64)
    noise = torch.randn(batch, 4, *size, dtype=torch.float64)

    def run():
        with layerwise_attention(double_unet), regional_attention(double_unet, plans):
            double_unet(noise, 7, encoder_hidden_states=contexts.flatten(1, 3))

    if call["sliced"]:
        double_unet.set_attention_slice("max")
    try:
        found = attention_calls(double_unet, run)
    finally:
        double_unet.set_default_attn_processor()
    of_rows = regions * (batch // len(regions))
    with torch.no_grad():
        for number, path in enumerate(paths):
            hidden, output = found[path]
            own = contexts[:, :, number if layers > 1 else 0].unbind(1)
            layer, grid = double_unet.get_submodule(path), (size[0] // 2, size[1] // 2)
            expected = expected_output(layer, hidden, own, of_rows, grid)
            assert torch.allclose(output, expected, rtol=0, atol=1e-12)
