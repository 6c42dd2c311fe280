"""Concepts in the weights of an SDXL pipeline: written as a whole, loaded with them, and the card that says how."""

import dataclasses

import pytest
import torch
from diffusers import StableDiffusionXLPipeline

import packs
from diffusers_mixofshow import EDLoRA, MixOfShowPipeline, MixOfShowXLImg2ImgPipeline, MixOfShowXLPipeline
from diffusers_mixofshow.errors import ConfigurationError
from families.pipelines import tiny_pipeline


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The folder of a tiny base."""
    folder = tmp_path_factory.mktemp("base")
    tiny_pipeline("Stable Diffusion XL").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pack(base):
    made = packs.random_pack(tiny_pipeline("Stable Diffusion XL").components, "rex", "kit")
    small = {site: dataclasses.replace(update, up=update.up * 0.1) for site, update in made.lora.items()}
    return dataclasses.replace(made, lora=small, base_model=str(base))


def quiet(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_a_whole_pipeline_draws_what_the_base_and_the_pack_do(base, pack, latents, tmp_path):
    pack.save_pretrained(tmp_path / "whole", merged=True)
    whole = quiet(MixOfShowXLPipeline.from_pretrained(tmp_path / "whole"))
    assert list(whole.concepts) == ["<rex>", "<kit>"]
    separate = quiet(MixOfShowXLPipeline.from_pretrained(base))
    plain = latents(separate, "a dog")
    separate.load_edlora(pack)
    for prompt in ("a <rex>", "a <kit> and a <rex>", "a dog"):
        expected, found = latents(separate, prompt), latents(whole, prompt)
        far = (latents(separate, "a cat") - expected).abs().mean()
        assert (found - expected).abs().mean() < 0.05 * far  # float16
    stock = quiet(StableDiffusionXLPipeline.from_pretrained(tmp_path / "whole"))
    assert torch.equal(latents(stock, "a dog"), latents(whole, "a dog"))
    assert not torch.allclose(latents(stock, "a dog"), plain, atol=1e-2)


def test_a_folder_of_another_family_is_refused_when_it_is_loaded(base, tmp_path):
    """diffusers would load what both have; the call would fail in the U-Net."""
    with pytest.raises(
        ConfigurationError, match=r"is of Stable Diffusion XL; expected .* MixOfShowXLPipeline\.from_p"
    ):
        MixOfShowPipeline.from_pretrained(base)
    tiny_pipeline("Stable Diffusion").save_pretrained(tmp_path)
    for kind in (MixOfShowXLPipeline, MixOfShowXLImg2ImgPipeline):
        with pytest.raises(ConfigurationError, match=r"is of Stable Diffusion; expected .* MixOfShowPipeline\.from_p"):
            kind.from_pretrained(tmp_path)
    assert MixOfShowXLImg2ImgPipeline.from_pretrained(base, unet=None).unet is None


def test_a_folder_of_another_family_is_refused_before_its_weights_are_read(base, tmp_path):
    """Of a repository they would be downloaded first: gigabytes for one error."""
    (tmp_path / "model_index.json").write_bytes((base / "model_index.json").read_bytes())
    with pytest.raises(ConfigurationError, match=r"is of Stable Diffusion XL; expected Stable Diffusion, "):
        MixOfShowPipeline.from_pretrained(tmp_path)
    for kind in (MixOfShowPipeline, MixOfShowXLPipeline):
        with pytest.raises(ConfigurationError, match=r"'toyland-sd3' is of Stable Diffusion 3; expected Stable Diff"):
            kind.from_pretrained("toyland-sd3")


def test_saved_again_the_concepts_go_with_it(pack, latents, tmp_path):
    pack.save_pretrained(tmp_path / "whole", merged=True)
    whole = quiet(MixOfShowXLPipeline.from_pretrained(tmp_path / "whole"))
    whole.save_pretrained(tmp_path / "again")
    again = quiet(MixOfShowXLPipeline.from_pretrained(tmp_path / "again"))
    torch.testing.assert_close(latents(again, "a <kit>"), latents(whole, "a <kit>"), rtol=1e-4, atol=1e-2)
    alone = EDLoRA.from_pretrained(tmp_path / "again")
    assert not alone.lora
    assert set(alone.embeddings) == set(pack.embeddings)


def test_a_pack_that_takes_the_place_of_a_whole_one_takes_all_of_it(pack, tmp_path):
    pack.save_pretrained(tmp_path, merged=True)
    assert (tmp_path / "text_encoder_2").is_dir()
    pack.save_pretrained(tmp_path, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "edlora.safetensors"]


@pytest.mark.parametrize("merged", [False, True])
def test_the_card_names_the_pipelines_of_its_family(pack, tmp_path, merged):
    pack.save_pretrained(tmp_path, merged=merged)
    card = (tmp_path / "README.md").read_text()
    assert "pipe = MixOfShowXLPipeline.from_pretrained(" in card
    assert "import Draft, MixOfShowXLPipeline, Refinement, Region" in card
    assert ("`StableDiffusionXLPipeline.from_pretrained` loads it as well" in card) is merged
    assert "MixOfShowPipeline" not in card.replace("MixOfShowXLPipeline", "")
