"""Self-attention in which regions do not see each other, against a mask written out position by position."""

import math

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor

import tiny
from diffusers_mixofshow.conditioning.attention import RegionPlan, regional_attention
from diffusers_mixofshow.errors import RegionError
from diffusers_mixofshow.families.layers import self_attention_layers
from diffusers_mixofshow.regions import Isolation, Region
from diffusers_mixofshow.regions.isolation import group_positions


LEFT, RIGHT = Region("left", box=(0, 0, 0.4, 1)), Region("right", box=(0.6, 0.2, 1, 1))
MIDDLE = Region("middle", box=(0.3, 0.3, 0.8, 0.8))


@pytest.fixture(scope="module")
def unet():
    return tiny.components()["unet"].double()


@pytest.fixture
def noise():
    return torch.randn(2, 4, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def _run(unet, noise, plans, isolation, steps=None):
    """Inputs and outputs of each self-attention layer, and the result."""
    calls = {}
    hooks = [
        unet.get_submodule(path).register_forward_hook(
            lambda _layer, inputs, output, path=path: calls.__setitem__(path, (inputs[0], output))
        )
        for path in self_attention_layers(unet)
    ]
    contexts = 1 + max(len(plan.regions) for plan in plans)
    text = torch.randn(len(noise), contexts * 77, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    try:
        with torch.no_grad(), regional_attention(unet, plans, steps, isolation):
            result = unet(noise, 5, encoder_hidden_states=text).sample
    finally:
        for hook in hooks:
            hook.remove()
    return calls, result


def _may_attend(regions, query, key, size):
    """Whether one position may see another: they share a region, or one of them is in none."""
    sets = []
    for position in (query, key):
        across, down = (position % size + 0.5) / size, (position // size + 0.5) / size
        boxes = enumerate(region.box for region in regions)
        sets.append({n for n, (left, top, right, bottom) in boxes if left <= across < right and top <= down < bottom})
    return not sets[0] or not sets[1] or bool(sets[0] & sets[1])


def _expected(layer, hidden, regions):
    """Self-attention with a mask, head by head."""
    size = math.isqrt(hidden.shape[1])
    allowed = torch.tensor([[_may_attend(regions, q, k, size) for k in range(size**2)] for q in range(size**2)])
    heads = []
    width = layer.to_q.out_features // layer.heads
    for start in range(0, layer.to_q.out_features, width):
        query, key, value = (
            project(hidden)[..., start : start + width] for project in (layer.to_q, layer.to_k, layer.to_v)
        )
        scores = (query @ key.transpose(1, 2) / math.sqrt(width)).masked_fill(~allowed, -math.inf)
        heads.append(scores.softmax(-1) @ value)
    return layer.to_out[0](torch.cat(heads, dim=-1))


@pytest.mark.parametrize("plain", [True, False], ids=["plain", "foreign"])
@pytest.mark.parametrize("regions", [[LEFT, RIGHT], [LEFT, MIDDLE, RIGHT], [MIDDLE]], ids=len)
def test_it_is_attention_with_a_mask(unet, noise, regions, plain):
    if not plain:
        unet.set_attn_processor(AttnProcessor())
    try:
        calls, _ = _run(unet, noise, [RegionPlan(regions)], Isolation())
    finally:
        unet.set_default_attn_processor()
    assert len(calls) == 4
    for path, (hidden, output) in calls.items():
        with torch.no_grad():
            expected = _expected(unet.get_submodule(path), hidden, regions)
        assert torch.allclose(output, expected, rtol=0, atol=1e-12)


def test_each_picture_is_isolated_by_its_own_plan(unet, noise):
    plans = [RegionPlan([LEFT, RIGHT]), RegionPlan([MIDDLE, RIGHT])]
    calls, _ = _run(unet, noise, plans, Isolation())
    for path, (hidden, output) in calls.items():
        for row, plan in enumerate(plans):
            with torch.no_grad():
                expected = _expected(unet.get_submodule(path), hidden[row : row + 1], plan.regions)
            assert torch.allclose(output[row : row + 1], expected, rtol=0, atol=1e-12)


def test_it_holds_where_and_when_it_is_asked_for(unet, noise):
    plan = [RegionPlan([LEFT, RIGHT])]
    _, without = _run(unet, noise, plan, None)
    _, isolated = _run(unet, noise, plan, Isolation())
    assert not torch.allclose(isolated, without, atol=1e-4)
    # The tiny model has attention at half of the latent's size only.
    assert torch.allclose(_run(unet, noise, plan, Isolation(scales=(1, 4)))[1], without)
    assert torch.allclose(_run(unet, noise, plan, Isolation(scales=(2,)))[1], isolated)
    assert torch.allclose(_run(unet, noise, plan, Isolation(start=0.5), lambda: 2)[1], without)
    assert torch.allclose(_run(unet, noise, plan, Isolation(end=0.5), lambda: 2)[1], isolated)


def test_groups_are_all_positions_once():
    weights = torch.tensor([[1, 1, 0, 0, 0.5], [0, 0, 1, 0, 0.5]])
    groups = [(queries.tolist(), keys.tolist()) for queries, keys in group_positions(weights)]
    assert sorted(groups) == [([0, 1], [0, 1, 3, 4]), ([2], [2, 3, 4]), ([3], [0, 1, 2, 3, 4]), ([4], [0, 1, 2, 3, 4])]


def test_every_defect_is_named_at_once():
    with pytest.raises(RegionError, match=r"start is 2.*scales are \(3,\)"):
        Isolation(start=2, scales=(3,))
    with pytest.raises(RegionError, match="never holds"):
        Isolation(start=0.5, end=0.5)
    with pytest.raises(RegionError, match="scales"):
        Isolation(scales=())


@pytest.mark.parametrize("isolation", [None, Isolation()])
def test_a_layer_with_a_mask_of_its_own_keeps_it(unet, noise, isolation):
    layer = unet.get_submodule(self_attention_layers(unet)[0])
    hidden = torch.randn(1, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    mask = torch.zeros(1, 1, 64, dtype=torch.float64)
    mask[..., 20:] = -1e4
    with torch.no_grad():
        plain, expected = layer(hidden), layer(hidden, attention_mask=mask)
        with regional_attention(unet, RegionPlan([LEFT, RIGHT]), isolation=isolation) as canvas:
            canvas.prepare_pass((noise,), {})
            found = layer(hidden, attention_mask=mask, canvas=canvas)
    assert torch.equal(found, expected)
    assert not torch.allclose(found, plain)
