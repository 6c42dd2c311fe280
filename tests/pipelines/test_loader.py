"""Loading and unloading concepts: by name, together, at a strength, and without a trace."""

import dataclasses
import hashlib

import pytest
import torch

from diffusers_mixofshow.edlora import EDLoRA
from diffusers_mixofshow.errors import ConceptError, ConfigurationError, EDLoRAFormatError, MixOfShowError
from diffusers_mixofshow.pipelines import MixOfShowPipeline
from diffusers_mixofshow.pipelines.publishing import join_packs


def _fingerprint(components):
    """Module classes, weights and vocabulary of everything that a concept could touch."""
    digest = hashlib.sha256()
    for name in ("unet", "text_encoder"):
        model = components[name]
        digest.update(str([(path, type(module).__name__) for path, module in model.named_modules()]).encode())
        for key, value in model.state_dict().items():
            digest.update(key.encode() + value.numpy().tobytes())
    digest.update(str(sorted(components["tokenizer"].get_vocab().items())).encode())
    return digest.hexdigest()


def test_concepts_are_listed_by_placeholder(pipe, make_pack):
    assert pipe.concepts == {}
    pipe.load_edlora(make_pack("potter"))
    pipe.load_edlora(make_pack("hermione", "thanos"))
    assert list(pipe.concepts) == ["<potter>", "<hermione>", "<thanos>"]
    assert pipe.get_list_adapters()["unet"] == ["potter", "hermione_thanos"]


def test_the_base_in_the_package_has_a_name_and_any_diffusers_takes_a_dtype(recwarn):
    pipe = MixOfShowPipeline.from_pretrained("toyland", dtype=torch.float16)
    assert {pipe.unet.dtype, pipe.text_encoder.dtype, pipe.vae.dtype} == {torch.float16}
    assert [str(warning.message) for warning in recwarn if "dtype" in str(warning.message)] == []


def test_a_base_in_half_precision_is_loaded_in_one_dtype_where_none_is_given(latents):
    pipe = MixOfShowPipeline.from_pretrained("toyland")
    assert {pipe.unet.dtype, pipe.text_encoder.dtype, pipe.vae.dtype} == {torch.float32}
    assert latents(pipe, "a dog").isfinite().all()


def test_another_pipeline_has_no_concepts(pipe, make_pack, components):
    pipe.load_edlora(make_pack("potter"))
    assert MixOfShowPipeline(**components, requires_safety_checker=False).concepts == {}


def test_unloading_leaves_no_trace(pipe, make_pack, components, latents):
    before, picture = _fingerprint(components), latents(pipe, "a dog")
    pipe.load_edlora(make_pack("potter"), scale=0.7)
    pipe.load_edlora(make_pack("thanos", seed=1))
    latents(pipe, "a <potter> and <thanos>")
    assert _fingerprint(components) != before
    pipe.unload_edlora()
    assert pipe.concepts == {}
    assert _fingerprint(components) == before
    assert torch.equal(latents(pipe, "a dog"), picture)


def test_one_of_several_is_unloaded_by_placeholder_or_adapter(pipe, make_pack, latents):
    pipe.load_edlora(make_pack("thanos", seed=1))
    alone = latents(pipe, "a <thanos>")
    pipe.load_edlora(make_pack("potter"))
    pipe.load_edlora(make_pack("hermione"), adapter_name="witch")
    assert not torch.equal(latents(pipe, "a <thanos>"), alone)
    pipe.unload_edlora(["<potter>", "witch"])
    assert list(pipe.concepts) == ["<thanos>"]
    assert torch.equal(latents(pipe, "a <thanos>"), alone)


def test_scale_zero_leaves_only_the_embeddings(pipe, make_pack, latents):
    pack = make_pack("potter")
    pipe.load_edlora(dataclasses.replace(pack, lora={}))
    only_embeddings = latents(pipe, "a <potter>")
    pipe.unload_edlora()
    pipe.load_edlora(pack, scale=0)
    assert torch.equal(latents(pipe, "a <potter>"), only_embeddings)
    pipe.unload_edlora()
    pipe.load_edlora(pack, scale=0.7)
    assert not torch.allclose(latents(pipe, "a <potter>"), only_embeddings, atol=1e-3)


def test_adapters_answer_to_diffusers_methods(pipe, make_pack, latents):
    pipe.load_edlora(make_pack("potter"), scale=0.3)
    weak = latents(pipe, "a <potter>")
    pipe.set_adapters("potter", 1.0)
    assert not torch.equal(latents(pipe, "a <potter>"), weak)
    pipe.set_adapters("potter", 0.3)
    assert torch.equal(latents(pipe, "a <potter>"), weak)


@pytest.mark.parametrize("taken", [["potter"], ["thanos", "potter"], ["potter1"]])
def test_a_name_is_loaded_only_once(pipe, make_pack, components, taken):
    pipe.load_edlora(make_pack("potter"))
    before = _fingerprint(components)
    with pytest.raises(ConceptError, match=r"potter1?>"):
        pipe.load_edlora(make_pack(*taken), adapter_name="other")
    assert _fingerprint(components) == before
    assert list(pipe.concepts) == ["<potter>"]


def test_a_word_of_the_tokenizer_is_refused(pipe, make_pack):
    pipe.tokenizer.add_tokens("<potter1>")
    with pytest.raises(ConceptError, match=r"<potter1>.*load_textual_inversion"):
        pipe.load_edlora(make_pack("potter"))


def test_a_pack_for_another_model_is_refused(pipe, make_pack, components):
    pack = make_pack("potter")
    before = _fingerprint(components)
    with pytest.raises(EDLoRAFormatError):
        pipe.load_edlora(dataclasses.replace(pack, layers=pack.layers[1:]))
    assert (_fingerprint(components), pipe.concepts) == (before, {})


def test_an_adapter_name_is_taken_once(pipe, make_pack):
    pipe.load_edlora(make_pack("potter"))
    with pytest.raises(MixOfShowError, match="potter"):
        pipe.load_edlora(make_pack("thanos"), adapter_name="potter")
    assert list(pipe.concepts) == ["<potter>"]


def test_unknown_names_are_not_unloaded(pipe, make_pack):
    pipe.load_edlora(make_pack("potter"))
    with pytest.raises(ConceptError, match=r"<poter>.*<potter>"):
        pipe.unload_edlora(["<potter>", "<poter>"])
    assert list(pipe.concepts) == ["<potter>"]


def test_saved_and_loaded_again_it_draws_the_same(pipe, make_pack, latents, tmp_path):
    pipe.load_edlora(make_pack("potter", "thanos"), scale=0.5)
    picture = latents(pipe, "a <potter>")
    path = pipe.save_edlora(tmp_path)
    pipe.unload_edlora()
    pipe.load_edlora(tmp_path, scale=0.5)
    assert torch.equal(latents(pipe, "a <potter>"), picture)
    pipe.unload_edlora()
    pipe.load_edlora(str(path), scale=0.5)
    assert torch.equal(latents(pipe, "a <potter>"), picture)


def test_saving_one_of_several_needs_its_name(pipe, make_pack, tmp_path):
    with pytest.raises(ConceptError, match="nothing is loaded"):
        pipe.save_edlora(tmp_path)
    pipe.load_edlora(make_pack("potter"))
    pipe.load_edlora(make_pack("thanos"))
    with pytest.raises(ConceptError, match="potter, thanos"):
        pipe.save_edlora(tmp_path)
    pipe.save_edlora(tmp_path, "<thanos>")
    assert [concept.name for concept in EDLoRA.from_pretrained(tmp_path).concepts] == ["thanos"]


def test_the_pipeline_is_saved_without_its_concepts(pipe, make_pack, components, latents, tmp_path):
    plain = latents(pipe, "a dog")
    pipe.load_edlora(make_pack("potter"))
    pipe.load_edlora(make_pack("thanos", seed=1))
    pipe.set_adapters(["potter", "thanos"], [0.4, 0.2])
    pipe.set_adapters("thanos", 0.2)
    before, picture = _fingerprint(components), latents(pipe, "a <thanos>")
    pipe.save_pretrained(tmp_path)
    assert _fingerprint(components) == before
    assert torch.equal(latents(pipe, "a <thanos>"), picture)
    again = MixOfShowPipeline.from_pretrained(tmp_path)
    assert again.concepts == {}
    assert torch.equal(latents(again, "a dog"), plain)


def test_concepts_go_with_the_unloading_of_all_lora_weights(pipe, make_pack, components, tmp_path):
    before = _fingerprint(components)
    pipe.load_edlora(make_pack("potter"))
    pipe.unload_lora_weights()
    assert list(pipe.concepts) == []
    pipe.save_pretrained(tmp_path)
    pipe.unload_edlora()
    assert _fingerprint(components) == before


@pytest.mark.parametrize("first_has_updates", [False, True])
@pytest.mark.parametrize("second_has_updates", [False, True])
def test_a_name_is_taken_by_embeddings_alone_as_well(pipe, make_pack, first_has_updates, second_has_updates):
    first, second = make_pack("potter"), make_pack("thanos")
    first = first if first_has_updates else dataclasses.replace(first, lora={})
    second = second if second_has_updates else dataclasses.replace(second, lora={})
    pipe.load_edlora(first, adapter_name="a")
    with pytest.raises(ConfigurationError, match="'a' is loaded already"):
        pipe.load_edlora(second, adapter_name="a")
    assert list(pipe.concepts) == ["<potter>"]
    pipe.unload_edlora()
    pipe.load_edlora(second, adapter_name="a")
    assert list(pipe.concepts) == ["<thanos>"]


def test_all_that_is_loaded_becomes_one_pack_that_acts_the_same(pipe, make_pack, latents):
    """Strengths and switches included; a plain LoRA goes with it, one that is switched off does not."""
    potter, thanos = make_pack("potter", seed=1), make_pack("thanos", seed=2)
    plain, silent = (
        dataclasses.replace(make_pack(seed=seed), base_model="", layers=(), embeddings={}, concepts=())
        for seed in (3, 4)
    )
    for name, one in (("plain", plain), ("potter", potter), ("thanos", thanos), ("silent", silent)):
        pipe.load_edlora(one, adapter_name=name)
    pipe.set_adapters(["plain", "potter", "thanos"], [0.5, 1.5, 0.25])
    expected = latents(pipe, "a <potter> and <thanos>")
    pack = join_packs(pipe.components, pipe._edloras)
    assert [concept.name for concept in pack.concepts] == ["potter", "thanos"]
    assert pack.embeddings.keys() == {*potter.embeddings, *thanos.embeddings}
    assert (pack.layers, pack.training) == (potter.layers, {})
    assert all(update.rank == 6 and update.scaling == 1 for update in pack.lora.values())
    pipe.unload_edlora()
    pipe.load_edlora(pack)
    assert torch.allclose(latents(pipe, "a <potter> and <thanos>"), expected, atol=1e-4)


def test_one_pack_that_is_published_keeps_what_is_said_of_its_training(pipe, make_pack):
    pipe.load_edlora(dataclasses.replace(make_pack("potter"), training={"steps": 3}))
    assert join_packs(pipe.components, pipe._edloras).training == {"steps": 3}
    pipe.disable_lora()
    assert not any(site.startswith("unet") for site in join_packs(pipe.components, pipe._edloras).lora)
    pipe.unload_edlora()
    with pytest.raises(ConceptError, match=r"^Nothing is loaded\. Load a concept"):
        join_packs(pipe.components, pipe._edloras)
