"""The whole pipeline: its parent without concepts, and pictures with concepts and regions."""

import inspect

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.callbacks import SDCFGCutoffCallback

from diffusers_mixofshow.errors import ConceptError, RegionError
from diffusers_mixofshow.families.layers import cross_attention_layers
from diffusers_mixofshow.pipelines import MixOfShowPipeline
from diffusers_mixofshow.regions import Region


LEFT, RIGHT = (0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0)


@pytest.fixture
def potter(pipe, make_pack):
    """The pipeline with one concept."""
    pipe.load_edlora(make_pack("potter"))
    return pipe


def _regions():
    return [Region("a <potter>", box=LEFT, negative_prompt="beard"), Region("a dog", box=(0.4, 0.2, 1, 1))]


def test_the_signature_is_the_parents_and_regions():
    parent = inspect.signature(StableDiffusionPipeline.__call__).parameters
    ours = inspect.signature(MixOfShowPipeline.__call__).parameters
    assert [name for name in ours if name not in ("regions", "isolation", "draft", "refine")] == list(parent)
    assert all(ours[name].default == parent[name].default for name in parent)
    assert "regions" in MixOfShowPipeline.__call__.__doc__
    assert "callback_on_step_end" in MixOfShowPipeline.__call__.__doc__


def test_components_and_loaders_are_the_parents(pipe, parent):
    assert pipe.components.keys() == parent.components.keys()
    assert isinstance(pipe, StableDiffusionPipeline)
    assert MixOfShowPipeline.model_cpu_offload_seq == StableDiffusionPipeline.model_cpu_offload_seq


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"negative_prompt": "bad"},
        {"guidance_scale": 1.0},
        {"guidance_rescale": 0.7},
        {"num_images_per_prompt": 2},
        {"prompt": ["a dog", "a cat"], "negative_prompt": ["x", "y"]},
        {"height": 48, "width": 16},
        {"cross_attention_kwargs": {"scale": 0.5}},
        {"prompt": None, "prompt_embeds": torch.ones(1, 100, 32), "negative_prompt_embeds": torch.zeros(1, 100, 32)},
    ],
    ids=lambda arguments: ",".join(arguments) or "nothing",
)
def test_without_concepts_and_regions_it_is_its_parent(potter, parent, latents, arguments):
    arguments = {"prompt": "a dog", **arguments}
    assert torch.equal(latents(potter, **arguments), latents(parent, **arguments))
    assert torch.equal(latents(potter, regions=[], **arguments), latents(parent, **arguments))


def test_positional_arguments_are_the_parents(pipe, parent):
    def run(pipeline):
        return pipeline("a dog", 32, 16, 1, output_type="latent", generator=torch.Generator().manual_seed(0)).images

    assert torch.equal(run(pipe), run(parent))


def test_pictures_are_drawn(potter):
    image = potter("a <potter>", regions=_regions(), height=32, width=48, num_inference_steps=1).images[0]
    assert image.size == (48, 32)


def test_layer_k_depends_on_embedding_k_alone(potter):
    seen = []
    paths = cross_attention_layers(potter.unet)
    for layer, path in enumerate(paths):
        potter.unet.get_submodule(path).to_k.register_forward_pre_hook(
            lambda _module, inputs, layer=layer: seen.append((layer, inputs[0].clone()))
        )

    def inputs():
        seen.clear()
        potter("a <potter>", num_inference_steps=1, output_type="latent", height=32, width=32)
        return dict(seen)

    before = inputs()
    for changed in range(len(paths)):
        row = potter._concept_embeddings["<potter1>"][changed]
        row.neg_()
        after = inputs()
        row.neg_()
        different = [layer for layer in before if not torch.allclose(before[layer], after[layer], atol=1e-4)]
        assert different == [changed]


def test_a_full_region_is_the_prompt(potter, latents):
    expected = latents(potter, "a <potter>", negative_prompt="bad")
    everywhere = Region("a <potter>", box=(0, 0, 1, 1))
    assert torch.allclose(latents(potter, "other", negative_prompt="bad", regions=[everywhere]), expected, atol=1e-5)
    instead = Region("a <potter>", box=(0, 0, 1, 1), negative_prompt="bad")
    assert torch.allclose(latents(potter, "other", negative_prompt="x", regions=[instead]), expected, atol=1e-5)


def test_regions_of_the_global_prompt_change_nothing(potter, latents):
    regions = [Region("a <potter>", box=LEFT), Region("a <potter>", box=(0.3, 0.1, 0.9, 0.6))]
    assert torch.allclose(latents(potter, "a <potter>", regions=regions), latents(potter, "a <potter>"), atol=1e-4)


def test_each_part_of_a_region_matters(potter, latents):
    def run(**changes):
        region = {"prompt": "a <potter>", "box": LEFT, "negative_prompt": "beard", **changes}
        return latents(potter, "two people", negative_prompt="bad", regions=[Region(**region)])

    pictures = [
        run(),
        run(prompt="a dog"),
        run(box=RIGHT),
        run(negative_prompt="hat"),
        run(negative_prompt=None),
        latents(potter, "two people", negative_prompt="bad"),
    ]
    for i, one in enumerate(pictures):
        assert not any(torch.allclose(one, other, atol=1e-5) for other in pictures[:i])


def test_without_guidance_only_the_prompts_count(potter, latents):
    def run(negative_prompt):
        regions = [Region("a <potter>", box=LEFT, negative_prompt=negative_prompt)]
        return latents(potter, "a dog", guidance_scale=1.0, regions=regions)

    assert torch.equal(run("beard"), run(None))


def test_a_second_call_uses_the_new_layout(potter, latents):
    first = latents(potter, "x", regions=[Region("a <potter>", box=LEFT)])
    second = latents(potter, "x", regions=[Region("a <potter>", box=RIGHT)])
    assert not torch.allclose(first, second, atol=1e-5)
    assert torch.equal(latents(potter, "x", regions=[Region("a <potter>", box=LEFT)]), first)
    plain = latents(potter, "x")
    assert not torch.allclose(first, plain, atol=1e-5)


@pytest.mark.parametrize("size", [(32, 32), (16, 48), (40, 24)])
def test_masks_and_boxes_agree_at_any_size(potter, latents, size):
    mask = np.zeros((100, 80), dtype=np.uint8)
    mask[:, :40] = 255
    settings = {"height": size[0], "width": size[1]}
    with_box = latents(potter, "x", regions=[Region("a <potter>", box=LEFT)], **settings)
    with_mask = latents(potter, "x", regions=[Region("a <potter>", mask=mask)], **settings)
    if size[1] % 32 == 0:  # the same cells on every feature map
        assert torch.equal(with_box, with_mask)
    assert with_mask.shape[-2:] == (size[0] // 2, size[1] // 2)


def test_a_thin_region_is_not_lost(potter, latents):
    thin = Region("a <potter>", box=(0.5, 0.0, 0.505, 1.0))
    assert not torch.allclose(latents(potter, "x", regions=[thin]), latents(potter, "x"), atol=1e-5)


def test_batches_are_loops(potter):
    prompts, negatives = ["a dog", "a <potter> here", "a cat"], ["x", "y", "<potter>"]
    noise = torch.randn(3, 4, 16, 16, generator=torch.Generator().manual_seed(3))
    settings = {"num_inference_steps": 2, "output_type": "latent", "height": 32, "width": 32, "regions": _regions()}
    together = potter(prompts, negative_prompt=negatives, latents=noise, **settings).images
    for row in range(3):
        alone = potter(prompts[row], negative_prompt=negatives[row], latents=noise[row : row + 1], **settings).images
        assert torch.allclose(together[row], alone[0], atol=1e-4)


def test_images_of_one_prompt_are_calls(potter):
    noise = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(3))
    settings = {"num_inference_steps": 2, "output_type": "latent", "height": 32, "width": 32, "regions": _regions()}
    together = potter("a <potter>", num_images_per_prompt=2, latents=noise, **settings).images
    for row in range(2):
        alone = potter("a <potter>", latents=noise[row : row + 1], **settings).images
        assert torch.allclose(together[row], alone[0], atol=1e-4)


def test_given_embeddings_do_the_prompts_work(potter, latents):
    expected = latents(potter, "a <potter>", negative_prompt="bad", regions=_regions())
    for prompt in ("a <potter>", "a dog"):
        positive, negative = potter.encode_prompt(prompt, torch.device("cpu"), 1, True, "bad")
        given = {"prompt_embeds": positive, "negative_prompt_embeds": negative}
        assert torch.allclose(latents(potter, **given), latents(potter, prompt, negative_prompt="bad"), atol=1e-5)
        same = torch.allclose(latents(potter, regions=_regions(), **given), expected, atol=1e-5)
        assert same == (prompt == "a <potter>")


def test_clip_skip_works_with_regions(potter, latents):
    assert not torch.equal(
        latents(potter, "a <potter>", regions=_regions(), clip_skip=1),
        latents(potter, "a <potter>", regions=_regions()),
    )


@pytest.mark.parametrize("regions", [None, _regions()], ids=["concept", "regions"])
def test_callbacks_see_and_change_what_they_asked_for(potter, latents, regions):
    steps = []

    def callback(pipeline, step, _timestep, tensors):
        assert pipeline is potter
        steps.append((step, sorted(tensors)))
        return {"latents": torch.zeros_like(tensors["latents"])} if step == 1 else tensors

    wanted = ["latents", "prompt_embeds"]
    arguments = {"callback_on_step_end": callback, "callback_on_step_end_tensor_inputs": wanted}
    result = latents(potter, "a <potter>", regions=regions, **arguments)
    assert steps == [(0, wanted), (1, wanted)]
    assert torch.equal(result, torch.zeros_like(result))


def test_guidance_may_stop_half_way(potter, latents):
    callback = SDCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=0)
    result = latents(potter, "a <potter>", regions=_regions(), callback_on_step_end=callback)
    assert not torch.equal(result, latents(potter, "a <potter>", regions=_regions()))


def test_nothing_stays_after_a_call_or_an_error(potter, latents):
    processors = dict(potter.unet.attn_processors)

    def fail(*_):
        raise KeyboardInterrupt

    latents(potter, "a <potter>", regions=_regions())
    with pytest.raises(KeyboardInterrupt):
        latents(potter, "a <potter>", regions=_regions(), callback_on_step_end=fail)
    assert all(potter.unet.attn_processors[name] is processor for name, processor in processors.items())
    assert potter._regions == ()
    assert potter.encode_prompt("a dog", torch.device("cpu"), 1, False)[0].shape[1] == 77


def test_wrong_regions_are_refused_before_anything_runs(potter):
    with pytest.raises(RegionError, match="dict"):
        potter("x", regions=[{"prompt": "a"}])
    with pytest.raises(ConceptError, match=r"<poter>.*<ron>"):
        potter("x", regions=[Region("a <poter>", box=LEFT), Region("b", box=RIGHT, negative_prompt="<ron>")])


def test_regions_need_no_concept(pipe, latents):
    regions = [Region("a cat", box=LEFT), Region("a dog", box=RIGHT)]
    assert not torch.equal(latents(pipe, "two pets", regions=regions), latents(pipe, "two pets"))


def test_several_packs_in_their_regions(potter, make_pack, latents):
    potter.load_edlora(make_pack("thanos", seed=1))
    regions = [Region("a <potter>", box=LEFT), Region("a <thanos>", box=RIGHT)]
    swapped = [Region("a <thanos>", box=LEFT), Region("a <potter>", box=RIGHT)]
    assert not torch.equal(latents(potter, "two", regions=regions), latents(potter, "two", regions=swapped))


def test_saved_and_loaded_it_is_the_same_class(pipe, latents, tmp_path):
    pipe.save_pretrained(tmp_path)
    again = MixOfShowPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert torch.equal(latents(again, "a dog"), latents(pipe, "a dog"))
    with_parent = StableDiffusionPipeline.from_pretrained(tmp_path)
    assert with_parent.components.keys() == pipe.components.keys()


def test_attention_slicing_keeps_working(potter, latents):
    expected = latents(potter, "a <potter>", regions=_regions())
    potter.enable_attention_slicing()
    assert torch.allclose(latents(potter, "a <potter>", regions=_regions()), expected, atol=1e-4)
