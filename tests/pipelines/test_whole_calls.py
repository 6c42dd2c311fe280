"""Whole calls against the paper's equations, written out in float64 as the authors' program computes them.

Nothing here is shared with the package but the concepts' numbers: tokens are rows added to the embedding table, one
table a layer (section 3.3.1); W = W0 + s B A is a weight; regions are boxes on each feature map (section 3.4); the
loop is DDIM's equation 12 (arXiv:2010.02502) with classifier-free guidance.
"""

import copy
import math

import pytest
import torch

import tiny
from diffusers_mixofshow import MixOfShowAdapterPipeline, MixOfShowPipeline, Region
from diffusers_mixofshow.families.layers import adapted_layers, cross_attention_layers


STEPS, SIZE = 3, (16, 24)  # rows and columns of the latent
LAYERS = (
    "down_blocks.1.attentions.0",
    "mid_block.attentions.0",
    "up_blocks.0.attentions.0",
    "up_blocks.0.attentions.1",
)


@pytest.fixture(scope="module")
def parts():
    found = tiny.components()
    for name in ("unet", "text_encoder", "vae"):
        found[name].double()
    return found


@pytest.fixture
def pack(parts, make_pack):
    return make_pack("rex", "kit", seed=3)


@pytest.fixture
def components(parts):
    """What `make_pack` fits: these very models."""
    return parts


def with_updates(parts, pack, scale):
    """Copies of the U-Net and the text encoder with W0 + scale * alpha / rank * B A as weights."""
    copies = {name: copy.deepcopy(parts[name]) for name in ("unet", "text_encoder")}
    for site, layer in adapted_layers(copies).items():
        update = pack.lora[site]
        layer.weight.data += scale * update.alpha / len(update.down) * update.up.double() @ update.down.double()
    return copies["unet"], copies["text_encoder"]


def encoded(text_encoder, tokenizer, pack, text, layer, clip_skip=None):
    """A text for one layer, its concepts' tokens new rows of the table; shape (77, 32)."""
    tokens = [token for concept in pack.concepts for token in concept.tokens]
    own = copy.deepcopy(text_encoder)
    table = own.get_input_embeddings()
    first = len(table.weight)
    rows = torch.stack([pack.embeddings[token][layer].double() for token in tokens])
    table.weight = torch.nn.Parameter(torch.cat([table.weight, rows]))
    ids = [tokenizer.bos_token_id]
    for word in text.split():
        concept = next((one for one in pack.concepts if one.placeholder == word), None)
        if concept is None:
            ids += tokenizer(word, add_special_tokens=False).input_ids
        else:
            ids += [first + tokens.index(token) for token in concept.tokens]
    ids += [tokenizer.eos_token_id] + [tokenizer.pad_token_id] * (76 - len(ids))
    output = own(torch.tensor([ids]), output_hidden_states=True)
    if clip_skip is None:
        return output.last_hidden_state[0]
    return getattr(own, "text_model", own).final_layer_norm(output.hidden_states[-1 - clip_skip])[0]


class Attention:
    """h = Attn(Q(z), K(P), V(P)) everywhere, then h[M_i] = the mean of the regions' own where they are."""

    def __init__(self, texts, boxes):
        self.texts, self.boxes, self.half, self.held = texts, boxes, 0, None

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, **others):
        cells = hidden_states.shape[1]
        rows = round(math.sqrt(cells * SIZE[0] / SIZE[1]))
        columns = cells // rows
        texts = self.texts[self.half]
        whole = self.attend(attn, hidden_states, texts[0])[0].unflatten(0, (rows, columns))
        total, count = torch.zeros_like(whole), torch.zeros(rows, columns, 1, dtype=torch.float64)
        for text, (left, top, right, bottom), holds in zip(texts[1:], self.boxes, self.held, strict=True):
            if holds:
                own = self.attend(attn, hidden_states, text)[0].unflatten(0, (rows, columns))
                place = (
                    slice(math.ceil(top * rows), math.floor(bottom * rows)),
                    slice(math.ceil(left * columns), math.floor(right * columns)),
                )
                total[place] += own[place]
                count[place] += 1
        return torch.where(count > 0, total / count.clamp(min=1), whole).flatten(0, 1)[None]

    @staticmethod
    def attend(attn, hidden, text):
        query, key, value = (
            each.unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for each in (attn.to_q(hidden), attn.to_k(text[None]), attn.to_v(text[None]))
        )
        scores = (query @ key.transpose(2, 3) / math.sqrt(query.shape[-1])).softmax(dim=-1)
        return attn.to_out[0]((scores @ value).transpose(1, 2).flatten(2))


def guidance_map(regions, guidance, held):
    """Each cell's strength of guidance: the regions' own where they are, of those that overlap the mean."""
    total, count = torch.zeros(SIZE, dtype=torch.float64), torch.zeros(SIZE)
    for region, holds in zip(regions, held, strict=True):
        left, top, right, bottom = region.box
        place = (
            slice(math.ceil(top * SIZE[0]), math.floor(bottom * SIZE[0])),
            slice(math.ceil(left * SIZE[1]), math.floor(right * SIZE[1])),
        )
        if holds:
            total[place] += guidance if region.guidance_scale is None else region.guidance_scale
            count[place] += 1
    return torch.where(count > 0, total / count.clamp(min=1), guidance)


def control_map(regions, held, rows, columns):
    """The same for the strength of adapters."""
    total, count = torch.zeros(rows, columns, dtype=torch.float64), torch.zeros(rows, columns)
    for region, holds in zip(regions, held, strict=True):
        left, top, right, bottom = region.box
        place = (
            slice(math.ceil(top * rows), math.floor(bottom * rows)),
            slice(math.ceil(left * columns), math.floor(right * columns)),
        )
        if holds:
            total[place] += region.control_scale
            count[place] += 1
    return torch.where(count > 0, total / count.clamp(min=1), 1.0)


@torch.no_grad()
def expected(
    parts, pack, prompt, noise, *, negative="", regions=(), guidance=7.5, scale=1.0, clip_skip=None, added=()
):
    """The latent (1, 4, rows, columns) at the end of one picture; `added` are the adapters' features."""
    unet, text_encoder = with_updates(parts, pack, scale)
    halves = [
        [negative, *(negative if one.negative_prompt is None else one.negative_prompt for one in regions)],
        [prompt, *(one.prompt for one in regions)],
    ]
    processors = []
    for number, path in enumerate(LAYERS):
        texts = [
            [encoded(text_encoder, parts["tokenizer"], pack, text, number, skip) for text in half]
            for half, skip in zip(halves, (None, clip_skip), strict=True)
        ]
        processors.append(Attention(texts, [one.box for one in regions]))
        unet.get_submodule(f"{path}.transformer_blocks.0.attn2").processor = processors[-1]
    alphas = parts["scheduler"].alphas_cumprod.double()
    jump, latent = 1000 // STEPS, noise
    for step in range(STEPS):
        timestep = (STEPS - 1 - step) * jump + 1  # the offset of Stable Diffusion's schedule
        held = [one.start <= step / STEPS + 1e-9 and (step + 1) / STEPS <= one.end + 1e-9 for one in regions]
        predictions = []
        for half in (0, 1):
            for processor in processors:
                processor.half, processor.held = half, held
            features = [each * control_map(regions, held, *each.shape[-2:]) for each in added]
            given = {"down_intrablock_additional_residuals": features} if added else {}
            empty = torch.zeros(1, 77, 32, dtype=torch.float64)
            predictions.append(unet(latent, timestep, encoder_hidden_states=empty, **given).sample)
        without, told = predictions
        noise_found = without + guidance_map(regions, guidance, held) * (told - without)
        now, after = alphas[timestep], alphas[timestep - jump] if timestep > jump else alphas[0]
        clean = (latent - (1 - now).sqrt() * noise_found) / now.sqrt()
        latent = after.sqrt() * clean + (1 - after).sqrt() * noise_found
    return latent


def box(*edges, prompt="a <kit>", **settings):
    return Region(prompt, box=edges, **{"rounding": "inward", **settings})


HALVES = [box(0, 0.1, 0.55, 1, prompt="a <rex> here", negative_prompt="cat"), box(0.4, 0, 1, 0.9)]
CALLS = {
    "one concept": {"prompt": "a <rex> at sea"},
    "half as strong, with little guidance": {"prompt": "a <rex>", "scale": 0.5, "guidance": 1.5},
    "a concept to avoid, without the last text layer": {"prompt": "a <rex>", "negative": "a <kit>", "clip_skip": 1},
    "two regions": {"prompt": "two friends", "negative": "bad", "regions": HALVES},
    "regions with guidance of their own": {
        "prompt": "two friends",
        "regions": [box(0, 0, 0.5, 1, guidance_scale=2.0), box(0.25, 0.5, 1, 1, prompt="a <rex>")],
    },
    "regions at times": {
        "prompt": "a <rex>",
        "regions": [box(0, 0, 0.5, 1, end=2 / 3), box(0.25, 0.5, 1, 1, start=1 / 3)],
    },
}


def noise_of(seed):
    return torch.randn(1, 4, *SIZE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def called(pipe, prompt, noise, **settings):
    """The latents of a call."""
    pipe.set_progress_bar_config(disable=True)
    given = {"num_inference_steps": STEPS, "output_type": "latent", "height": 2 * SIZE[0], "width": 2 * SIZE[1]}
    return pipe(prompt, latents=noise, **given, **settings).images


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_call_is_the_equations(parts, pack, call):
    pipe = MixOfShowPipeline(**parts, requires_safety_checker=False)
    pipe.load_edlora(pack, scale=call.get("scale", 1.0))
    settings = {"guidance_scale": call.get("guidance", 7.5), "negative_prompt": call.get("negative", "")}
    settings |= {name: call[name] for name in ("regions", "clip_skip") if name in call}
    found = called(pipe, call["prompt"], noise_of(1), **settings)
    pipe.unload_edlora()
    torch.testing.assert_close(found, expected(parts, pack, noise=noise_of(1), **call), rtol=1e-6, atol=1e-6)


def test_adapters_act_by_picture_strength_and_region(parts, pack):
    """Two prompts with images, regions and negative prompts of their own, two adapters; guidance doubles the batch."""
    adapters = [tiny.adapter(seed=seed).double() for seed in (1, 2)]
    images = [torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(seed)).double() for seed in (3, 4)]
    regions = [
        [box(0, 0, 0.5, 1, control_scale=0.2), box(0.25, 0, 1, 0.5, prompt="a <rex>", control_scale=2.0)],
        [box(0.5, 0.25, 1, 1, control_scale=0.0, end=2 / 3)],
    ]
    prompts, negatives, strengths = ["two friends", "a <rex>"], ["bad", "a <kit>"], [0.7, 1.3]
    pipe = MixOfShowAdapterPipeline(**parts, adapter=adapters, requires_safety_checker=False)
    pipe.load_edlora(pack)
    noise = torch.cat([noise_of(seed) for seed in (1, 1, 2, 2)])
    found = called(
        pipe,
        prompts,
        noise,
        negative_prompt=negatives,
        regions=regions,
        image=images,
        adapter_conditioning_scale=strengths,
        num_images_per_prompt=2,
    )
    pipe.unload_edlora()
    for number, prompt in enumerate(prompts):
        with torch.no_grad():
            features = [
                strength * adapter(image[number : number + 1])[0]
                for adapter, image, strength in zip(adapters, images, strengths, strict=True)
            ]
        settings = {"negative": negatives[number], "regions": regions[number], "added": [sum(features)]}
        wanted = expected(parts, pack, prompt, noise_of(number + 1), **settings)
        for picture in found[2 * number : 2 * number + 2]:
            torch.testing.assert_close(picture[None], wanted, rtol=1e-6, atol=1e-6)


def test_the_layers_are_in_the_papers_order(parts):
    assert cross_attention_layers(parts["unet"]) == tuple(f"{path}.transformer_blocks.0.attn2" for path in LAYERS)
