"""Whole calls of Stable Diffusion XL against their equations, written out in float64.

As in `test_whole_calls`, nothing here is shared with the package but the concepts' numbers: a token is a row added to
the tables of both text encoders, one pair of tables for each of the U-Net's groups of layers, and one more for the
vector of the whole text. W = W0 + s B A is a weight; what a U-Net reads is written into each attention layer by hand.
"""

import copy

import pytest
import torch
from diffusers import DDIMScheduler

from diffusers_mixofshow import MixOfShowXLPipeline, Region
from diffusers_mixofshow.concepts import Concept
from diffusers_mixofshow.edlora import EDLoRA, LowRank
from diffusers_mixofshow.families.layers import adapted_layers
from families.pipelines import tiny_pipeline
from pipelines.test_whole_calls import SIZE, STEPS, Attention, guidance_map


GROUPS = {
    "down_blocks.1.attentions.0": 2,
    "mid_block.attentions.0": 2,
    "up_blocks.0.attentions.0": 2,
    "up_blocks.0.attentions.1": 2,
}
"""The tiny U-Net's groups in the paper's order, with their layers."""
ENCODERS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}
MODELS = ("unet", *ENCODERS)
PIXELS = (2 * SIZE[0], 2 * SIZE[1])


@pytest.fixture(scope="module")
def parts():
    found = tiny_pipeline("Stable Diffusion XL").components
    for name in (*MODELS, "vae"):
        found[name].double()
    scheduler = DDIMScheduler.from_config(found["scheduler"].config, clip_sample=False, set_alpha_to_one=False)
    return found | {"scheduler": scheduler}


def random_pack(parts, *names, seed=0):
    """An ED-LoRA of these concepts on every site, strong enough to see."""
    random = torch.Generator().manual_seed(seed)
    concepts = tuple(Concept.from_name(name, "man") for name in names)
    embeddings = {}
    for token in (token for concept in concepts for token in concept.tokens):
        for name, part, rows in [
            ("text_encoder", "", len(GROUPS)),
            ("text_encoder_2", "text_encoder_2.", len(GROUPS)),
            ("text_encoder_2", "pooled.", 1),
        ]:
            table = parts[name].get_input_embeddings().weight
            embeddings[part + token] = 3 * table.std().item() * torch.randn(rows, table.shape[1], generator=random)
    lora = {
        site: LowRank(
            down=torch.randn(2, layer.in_features, generator=random) * 0.2,
            up=torch.randn(layer.out_features, 2, generator=random) * 0.2,
            alpha=3.0,
        )
        for site, layer in adapted_layers(parts).items()
    }
    return EDLoRA(concepts=concepts, embeddings=embeddings, lora=lora, base_model="tiny", layers=tuple(GROUPS))


@pytest.fixture(scope="module")
def pack(parts):
    return random_pack(parts, "rex", "kit", seed=3)


def with_updates(parts, pack, scale):
    """Copies of the models with W0 + scale * alpha / rank * B A as weights."""
    copies = {name: copy.deepcopy(parts[name]) for name in MODELS}
    for site, layer in adapted_layers(copies).items():
        update = pack.lora[site]
        layer.weight.data += scale * update.alpha / len(update.down) * update.up.double() @ update.down.double()
    return copies


def output_of(encoder, tokenizer, pack, rows, text):
    """What a text encoder gives of a text, its concepts' tokens the given rows of the table."""
    tokens = [token for concept in pack.concepts for token in concept.tokens]
    own = copy.deepcopy(encoder)
    table = own.get_input_embeddings()
    first = len(table.weight)
    table.weight = torch.nn.Parameter(torch.cat([table.weight, torch.stack([rows[token] for token in tokens])]))
    ids = [tokenizer.bos_token_id]
    for word in text.split():
        concept = next((one for one in pack.concepts if one.placeholder == word), None)
        if concept is None:
            ids += tokenizer(word, add_special_tokens=False).input_ids
        else:
            ids += [first + tokens.index(token) for token in concept.tokens]
    end = len(ids)
    ids += [tokenizer.eos_token_id] + [tokenizer.pad_token_id] * (76 - len(ids))
    return own(torch.tensor([ids]), output_hidden_states=True), end


def encoded(models, parts, pack, texts, group, clip_skip=None):
    """What one group of layers reads of a text: both encoders' last states but one, side by side, shape (77, 80)."""
    states = []
    for (name, tokenizer), part, text in zip(ENCODERS.items(), ("", "text_encoder_2."), texts, strict=True):
        rows = {name[len(part) :]: each[group].double() for name, each in pack.embeddings.items()
                if name.partition("<")[0] == part}  # fmt: skip
        found, _ = output_of(models[name], parts[tokenizer], pack, rows, text)
        states.append(found.hidden_states[-2 - (clip_skip or 0)][0])
    return torch.cat(states, dim=-1)


def vector_of(models, parts, pack, text):
    """The second encoder's last state at the text's end, normed and projected."""
    rows = {name.removeprefix("pooled."): each[0].double() for name, each in pack.embeddings.items()
            if name.startswith("pooled.")}  # fmt: skip
    encoder = models["text_encoder_2"]
    found, end = output_of(encoder, parts["tokenizer_2"], pack, rows, text)
    return encoder.text_projection(encoder.text_model.final_layer_norm(found.hidden_states[-1][:, end]))


@torch.no_grad()
def expected(
    parts,
    pack,
    prompt,
    noise,
    *,
    prompt_2=None,
    negative=None,
    regions=(),
    guidance=5.0,
    scale=1.0,
    clip_skip=None,
    sizes=(*PIXELS, 0, 0, *PIXELS),
):
    """The latent (1, 4, rows, columns) at the end of one picture; no negative prompt means zeros."""
    models = with_updates(parts, pack, scale)
    unet = models["unet"]

    def text(given, group, skip):
        return torch.zeros(77, 80, dtype=torch.float64) if given is None else encoded(
            models, parts, pack, given, group, skip
        )  # fmt: skip

    def twice(given):
        return None if given is None else (given, given)

    halves = [
        [
            twice(negative),
            *(twice(negative if one.negative_prompt is None else one.negative_prompt) for one in regions),
        ],
        [(prompt, prompt_2 or prompt), *(twice(one.prompt) for one in regions)],
    ]
    processors = []
    for number, (path, layers) in enumerate(GROUPS.items()):
        texts = [[text(given, number, skip) for given in half]
                 for half, skip in zip(halves, (None, clip_skip), strict=True)]  # fmt: skip
        for layer in range(layers):
            processors.append(Attention(texts, [one.box for one in regions]))
            unet.get_submodule(f"{path}.transformer_blocks.{layer}.attn2").processor = processors[-1]
    vectors = [
        torch.zeros(1, 40, dtype=torch.float64) if negative is None else vector_of(models, parts, pack, negative),
        vector_of(models, parts, pack, prompt_2 or prompt),
    ]
    alphas = parts["scheduler"].alphas_cumprod.double()
    jump, latent = 1000 // STEPS, noise
    for step in range(STEPS):
        timestep = (STEPS - 1 - step) * jump + 1
        held = [one.start <= step / STEPS + 1e-9 and (step + 1) / STEPS <= one.end + 1e-9 for one in regions]
        predictions = []
        for half in (0, 1):
            for processor in processors:
                processor.half, processor.held = half, held
            told = {"text_embeds": vectors[half], "time_ids": torch.tensor([sizes], dtype=torch.float64)}
            empty = torch.zeros(1, 77, 80, dtype=torch.float64)
            predictions.append(unet(latent, timestep, encoder_hidden_states=empty, added_cond_kwargs=told).sample)
        without, asked = predictions
        found = without + guidance_map(regions, guidance, held) * (asked - without)
        now, after = alphas[timestep], alphas[timestep - jump] if timestep > jump else alphas[0]
        clean = (latent - (1 - now).sqrt() * found) / now.sqrt()
        latent = after.sqrt() * clean + (1 - after).sqrt() * found
    return latent


def box(*edges, prompt="a <kit>", **settings):
    return Region(prompt, box=edges, **{"rounding": "inward", **settings})


HALVES = [box(0, 0.1, 0.55, 1, prompt="a <rex> here", negative_prompt="cat"), box(0.4, 0, 1, 0.9)]
CALLS = {
    "one concept": {"prompt": "a <rex> at sea"},
    "half as strong, with little guidance": {"prompt": "a <rex>", "scale": 0.5, "guidance": 1.5},
    "a concept to avoid, without the last text layer": {"prompt": "a <rex>", "negative": "a <kit>", "clip_skip": 1},
    "another text for the second encoder": {"prompt": "a <rex>", "prompt_2": "a <kit> in oil", "negative": ""},
    "two regions": {"prompt": "two friends", "negative": "bad", "regions": HALVES},
    "two regions and a concept everywhere, without anything to avoid": {"prompt": "a <rex>", "regions": HALVES},
    "regions with guidance of their own, at times": {
        "prompt": "two friends",
        "negative": "",
        "regions": [box(0, 0, 0.5, 1, guidance_scale=2.0, end=2 / 3), box(0.25, 0.5, 1, 1, prompt="a <rex>")],
    },
    "a cropped photo": {"prompt": "a <rex>", "sizes": (90, 70, 3, 5, 48, 64), "regions": HALVES},
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_call_is_the_equations(parts, pack, call):
    pipe = MixOfShowXLPipeline(**parts, add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    pipe.load_edlora(pack, scale=call.get("scale", 1.0))
    noise = torch.randn(1, 4, *SIZE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    settings = {name: call[name] for name in ("regions", "clip_skip", "prompt_2") if name in call}
    if "sizes" in call:
        sizes = call["sizes"]
        settings |= {"original_size": sizes[:2], "crops_coords_top_left": sizes[2:4], "target_size": sizes[4:]}
    found = pipe(
        call["prompt"],
        latents=noise,
        num_inference_steps=STEPS,
        output_type="latent",
        height=PIXELS[0],
        width=PIXELS[1],
        guidance_scale=call.get("guidance", 5.0),
        negative_prompt=call.get("negative"),
        **settings,
    ).images
    pipe.unload_edlora()
    torch.testing.assert_close(found, expected(parts, pack, noise=noise, **call), rtol=1e-6, atol=1e-6)


def test_a_batch_of_prompts_with_and_without_concepts_is_its_calls(parts, pack):
    """Each has its own states and its own vector, in whatever order they stand."""
    pipe = MixOfShowXLPipeline(**parts, add_watermarker=False)
    pipe.load_edlora(pack, scale=0.5)
    prompts, negatives = ["a <rex>", "a dog", "a <kit> here", "<rex> <kit>"], ["x", "<kit>", "y", "<rex>"]
    together = pipe.encode_prompt(prompts, negative_prompt=negatives)
    for row, (prompt, negative) in enumerate(zip(prompts, negatives, strict=True)):
        alone = pipe.encode_prompt(prompt, negative_prompt=negative)
        for one, other in zip(together, alone, strict=True):
            other = other if other.ndim == 2 or other.shape[1] > 77 else other.repeat(1, len(GROUPS), 1)
            torch.testing.assert_close(one[row], other[0], rtol=1e-6, atol=1e-6)
    pipe.unload_edlora()
