"""Regional attention against the equations of section 3.4, written out position by position, in float64."""

import math
import random

import numpy as np
import pytest
import torch

import tiny
from diffusers_mixofshow.conditioning.attention import RegionPlan, layerwise_attention, regional_attention
from diffusers_mixofshow.regions import Region
from diffusers_mixofshow.sites import cross_attention_layers


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


def random_regions(chance, grid):
    """Boxes and masks, up to four, each of them on at least one cell of the feature map; half of them plain."""
    plain = chance.random() < 0.5
    regions = []
    rows, columns = grid
    for number in range(chance.randint(1, 4)):
        settings = {} if plain else {"weight": chance.choice([0.3, 1, 2]), "order": chance.choice([0, 1])}
        if chance.random() < 0.6:
            left, top = chance.uniform(0, 0.6), chance.uniform(0, 0.6)
            box = (left, top, chance.uniform(left + 0.3, 1), chance.uniform(top + 0.3, 1))
            region = Region(f"box {number}", box=box, **settings)
        else:
            mask = np.random.default_rng(chance.randrange(10**6)).random((rows * 3, columns * 3)) < chance.random()
            mask[:3, :3] = True
            region = Region(f"mask {number}", mask=mask, **settings)
        if any(is_inside(region, row, column, rows, columns) for row in range(rows) for column in range(columns)):
            regions.append(region)
    return regions


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


@pytest.mark.parametrize("seed", range(12))
def test_random_layouts_are_the_equations(double_unet, seed):
    chance = random.Random(seed)
    torch.manual_seed(seed)
    size = chance.choice([(8, 8), (12, 8), (6, 10), (4, 16)])
    grid = (size[0] // 2, size[1] // 2)
    paths = cross_attention_layers(double_unet)
    batch, layers = chance.choice([1, 2, 4]), chance.choice([1, len(paths)])
    pictures = 2 if batch == 4 else 1  # of each prompt or of all; the other rows are the other half of guidance
    regions = [random_regions(chance, grid) for _ in range(pictures)]
    plans = [RegionPlan(own) for own in regions]
    contexts = torch.randn(batch, max(plan.contexts for plan in plans), layers, TOKENS, WIDTH, dtype=torch.float64)
    noise = torch.randn(batch, 4, *size, dtype=torch.float64)

    if seed % 4 == 3:
        double_unet.set_attention_slice("max")

    def run():
        with layerwise_attention(double_unet), regional_attention(double_unet, plans):
            double_unet(noise, 7, encoder_hidden_states=contexts.flatten(1, 3))

    try:
        calls = attention_calls(double_unet, run)
    finally:
        double_unet.set_default_attn_processor()
    with torch.no_grad():
        for number, path in enumerate(paths):
            hidden, output = calls[path]
            own = contexts[:, :, number if layers > 1 else 0].unbind(1)
            expected = expected_output(
                double_unet.get_submodule(path), hidden, own, regions * (batch // pictures), grid
            )
            assert torch.allclose(output, expected, rtol=0, atol=1e-12)
