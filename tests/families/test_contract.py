"""Every family keeps its word, on a tiny pipeline of the true classes: what it says of layers is what they do."""

from __future__ import annotations

import inspect
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

import diffusers
import pytest
import torch

import diffusers_mixofshow
from diffusers_mixofshow import pipelines
from diffusers_mixofshow.families import FAMILIES, Family, family_of, family_of_index, family_of_sites
from diffusers_mixofshow.families.layers import (
    adapted_layers,
    components_with_sites,
    cross_attention_layers,
    embedding_layers,
    linear_layers,
)
from diffusers_mixofshow.families.sdxl import SDXL, STABLE_DIFFUSION_XL
from families.pipelines import tiny_pipeline
from families.spellings import times_in_original


# The installed diffusers may be older than a family.
HERE = [family for family in FAMILIES if hasattr(diffusers, family.pipeline)]
STEPS = 2


@pytest.fixture(scope="module", params=HERE, ids=lambda family: family.name)
def family(request: pytest.FixtureRequest) -> Family:
    return request.param


@pytest.fixture(scope="module")
def pipe(family: Family) -> Any:
    return tiny_pipeline(family.name)


@pytest.fixture(scope="module")
def seen(family: Family, pipe: Any) -> dict[str, list[torch.Tensor]]:
    """What every layer reads in each denoising step of a call."""
    found: dict[str, list[torch.Tensor]] = {}
    layers = linear_layers(pipe.components)

    def note(site: str) -> Any:
        return lambda module, inputs: found.setdefault(site, []).append(inputs[0].clone())

    hooks = [layer.register_forward_pre_hook(note(site)) for site, layer in layers.items()]
    side = 8 * pipe.vae_scale_factor
    pipe(
        prompt=["a red dog", "two cats"],
        **{family.guidance_argument: family.guidance_off},
        num_inference_steps=STEPS,
        height=side,
        width=side,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
    )
    for hook in hooks:
        hook.remove()
    return found


def test_a_family_is_known_by_the_parts_of_its_pipeline(family: Family, pipe: Any) -> None:
    assert type(pipe).__name__ == family.pipeline
    assert family_of(pipe.components) is family
    assert [part for part in family.parts if pipe.components.get(part) is None] == []
    assert type(pipe.components[family.denoiser]).__name__ == family.denoiser_class
    assert list(components_with_sites(pipe.components)) == list(family.components)
    assert family_of_index(dict(pipe.config)) is family


def test_its_sites_are_linear_layers_that_a_call_uses(family: Family, pipe: Any, seen: dict[str, Any]) -> None:
    layers = linear_layers(pipe.components)
    assert layers.keys() == seen.keys()
    assert all(isinstance(layer, torch.nn.Linear | torch.nn.Conv2d) for layer in layers.values())
    assert all(map(family.has_site, layers))
    assert not any(family.has_site(f"{site}.x") or family.has_site(f"vae.{site}") for site in layers)
    adapted = adapted_layers(pipe.components)
    assert adapted.keys() < layers.keys()
    assert {component for site in adapted for component in [site.partition(".")[0]]} == set(family.components)


def test_its_sites_are_all_linear_layers_of_the_denoisers_blocks(family: Family, pipe: Any) -> None:
    """What is in no block, the way in and out, is no site."""
    denoiser = pipe.components[family.denoiser]
    outside = {
        path
        for path, module in denoiser.named_modules()
        if isinstance(module, torch.nn.Linear) and not family.has_site(f"{family.denoiser}.{path}")
    }
    assert [path for path in outside if re.search(r"blocks?\.\d|layers\.\d|refiner\.\d", path)] == []


def test_layers_with_one_name_for_their_input_read_one_tensor(family: Family, seen: dict[str, Any]) -> None:
    for name, sites in family.by_input(seen).items():
        first, *others = (seen[site] for site in sites)
        for other in others:
            assert len(other) == len(first), name
            assert all(torch.equal(one, two) for one, two in zip(first, other, strict=True)), name


def test_layers_of_one_module_that_read_one_tensor_have_one_name_for_it(family: Family, seen: dict[str, Any]) -> None:
    """Otherwise its Gram matrix would be recorded and kept twice."""
    for one, two in _pairs_within_modules(list(seen)):
        alike = all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(seen[one], seen[two], strict=True))
        assert alike is (family.input_of(one) == family.input_of(two)), (one, two)


def _pairs_within_modules(sites: list[str]) -> Iterator[tuple[str, str]]:
    parents = {site: site.rpartition(".")[0] for site in sites}
    for i, one in enumerate(sites):
        yield from ((one, two) for two in sites[i + 1 :] if parents[one] == parents[two])


def test_stages_and_groups_have_every_site_once_and_text_stages_do_not_change(
    family: Family, seen: dict[str, list[torch.Tensor]]
) -> None:
    for site, inputs in seen.items():
        assert family.group_of(site) in family.groups
        if family.stage_of(site).text_alone and site.startswith(f"{family.denoiser}."):
            assert len(inputs) == STEPS
            assert all(torch.equal(each, inputs[0]) for each in inputs), site
    changing = [site for site, inputs in seen.items() if not family.stage_of(site).text_alone]
    assert changing
    assert [site for site in changing if all(torch.equal(each, seen[site][0]) for each in seen[site])] == []
    assert {family.stage_of(site).name for site in seen} == {stage.name for stage in family.stages}
    assert {family.group_of(site) for site in seen} | {"other"} == set(family.groups) | {"other"}


def test_names_of_sites_alone_tell_the_family_where_no_other_has_them(family: Family, pipe: Any) -> None:
    found = family_of_sites(linear_layers(pipe.components))
    assert found.denoiser == family.denoiser
    assert all(map(found.has_site, linear_layers(pipe.components)))


@pytest.mark.parametrize(("above", "halves"), [(0.0, 1), (0.5, 2)])
def test_above_its_bound_guidance_draws_a_second_half(family: Family, pipe: Any, above: float, halves: int) -> None:
    rows: list[int] = []

    def count(module: Any, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        first = next(each for each in (*inputs, *named.values()) if isinstance(each, torch.Tensor | list))
        rows.append(len(first))

    hook = pipe.components[family.denoiser].register_forward_pre_hook(count, with_kwargs=True)
    pipe(
        prompt=["a red dog"],
        **{family.guidance_argument: family.guidance_off + above},
        **({"negative_prompt": ["blurry"]} if family.takes_negative_prompt and above else {}),
        num_inference_steps=1,
        height=8 * pipe.vae_scale_factor,
        width=8 * pipe.vae_scale_factor,
        output_type="latent",
    )
    hook.remove()
    # FLUX.1 learnt what guidance gives, and reads its strength as a number.
    assert sum(rows) == (1 if family.name == "FLUX.1" else halves)
    assert sum(rows) == family.count_halves(family.guidance_off + above)


def test_the_call_takes_what_the_family_says(family: Family, pipe: Any) -> None:
    taken = inspect.signature(pipe.__call__).parameters
    assert family.guidance_argument in taken
    assert ("negative_prompt" in taken) or not family.takes_negative_prompt
    assert not family.sampler or hasattr(diffusers, family.sampler)
    assert family.models
    assert all(not model.layers or family.cross_attention for model in family.models)


def test_its_original_code_has_every_layer_of_the_denoiser_once(family: Family, pipe: Any) -> None:
    if not family.original:
        pytest.skip("Its files' names are told by rules.")
    counts = times_in_original(family, pipe)
    assert set(counts.values()) == {1}, {path: count for path, count in counts.items() if count != 1}


def test_no_two_names_of_transformers_are_alike_without_their_dots() -> None:
    paths = {path for family in FAMILIES for name, layer in family.original.items() for path in (name, *layer.paths)}
    flat = Counter(path.replace(".", "_") for path in paths)
    assert [name for name, count in flat.items() if count > 1] == []


def test_what_draws_concepts_is_a_pipeline_of_this_package_with_its_siblings(family: Family, pipe: Any) -> None:
    assert bool(family.concept_pipeline) is bool(family.cross_attention)
    for task in ("", "Img2Img", "Inpaint", "ControlNet", "Adapter") if family.concept_pipeline else ():
        kind = pipelines.choose_pipeline(pipe.components, task)
        assert kind.__name__ == family.concept_pipeline.replace("Pipeline", f"{task}Pipeline")
        assert issubclass(kind, diffusers.DiffusionPipeline)
        assert getattr(diffusers_mixofshow, kind.__name__) is kind


def test_every_cross_attention_module_belongs_to_one_layer_of_embeddings(family: Family, pipe: Any) -> None:
    modules = cross_attention_layers(pipe.components[family.denoiser])
    layers = embedding_layers(pipe.components)
    assert bool(modules) is bool(layers) is bool(family.cross_attention)
    for path in modules:
        assert sum(path == layer or path.startswith(f"{layer}.") for layer in layers) == 1
    assert set(family.embedding_parts.values()) == set(family.text_encoders)


def test_the_published_sdxl_has_eleven_groups() -> None:
    groups = dict.fromkeys(map(STABLE_DIFFUSION_XL.embedding_layer_of, SDXL.layers))
    assert (len(SDXL.layers), len(groups)) == (70, 11)
    counts = [sum(path.startswith(f"{group}.") for path in SDXL.layers) for group in groups]
    assert counts == [2, 2, 10, 10, 10, 10, 10, 10, 2, 2, 2]
    assert STABLE_DIFFUSION_XL.embedding_parts == {
        "": "text_encoder", "text_encoder_2": "text_encoder_2", "pooled": "text_encoder_2"
    }  # fmt: skip
