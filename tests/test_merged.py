"""A complete pipeline with the updates in its weights: what `EDLoRA.save_pretrained(..., merged=True)` writes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline

import packs
import tiny
from diffusers_mixofshow import MixOfShowPipeline
from diffusers_mixofshow.edlora import EDLoRA
from diffusers_mixofshow.errors import ConfigurationError, EDLoRAFormatError


def _latents(pipe: StableDiffusionPipeline, prompt: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    pipe.set_progress_bar_config(disable=True)
    return pipe(prompt, num_inference_steps=2, generator=generator, output_type="latent").images


@pytest.fixture
def pack(tmp_path: Path) -> EDLoRA:
    """A pack of two concepts whose base model is a folder on this disk."""
    pipe = StableDiffusionPipeline(**tiny.components(), requires_safety_checker=False)
    pipe.save_pretrained(tmp_path / "base")
    weak = packs.random_pack(pipe.components, "rex", "tom")
    lora = {site: replace(update, alpha=0.2) for site, update in weak.lora.items()}
    return replace(weak, base_model=str(tmp_path / "base"), lora=lora)


def test_it_draws_what_base_and_pack_draw_with_and_without_concepts(pack: EDLoRA, tmp_path: Path) -> None:
    pack.save_pretrained(tmp_path / "merged", merged=True)
    expected = MixOfShowPipeline.from_pretrained(pack.base_model)
    expected.load_edlora(pack)
    merged = MixOfShowPipeline.from_pretrained(tmp_path / "merged")
    assert list(merged.concepts) == ["<rex>", "<tom>"]
    half = torch.finfo(torch.float16).eps
    for prompt in ("a <rex>", "a <tom> and a <rex>", "a dog"):
        wanted = _latents(expected, prompt)
        assert (_latents(merged, prompt) - wanted).abs().max() < 20 * half * wanted.abs().max(), prompt
    plain = StableDiffusionPipeline.from_pretrained(tmp_path / "merged")
    assert torch.equal(_latents(plain, "a dog"), _latents(merged, "a dog"))


def test_it_is_written_over_an_earlier_one_and_nothing_else_is_touched(pack: EDLoRA, tmp_path: Path) -> None:
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "mine.txt").write_text("mine")
    for overwrite in (False, True):
        pack.save_pretrained(tmp_path / "merged", merged=True, overwrite=overwrite)
    assert (tmp_path / "merged" / "mine.txt").read_text() == "mine"
    assert not list((tmp_path / "merged").glob(".merged-*"))
    assert "MixOfShowPipeline.from_pretrained" in (tmp_path / "merged" / "README.md").read_text()


def test_a_base_that_is_not_there_or_does_not_fit_is_one_clear_error(pack: EDLoRA, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"nowhere.*merged=True"):
        replace(pack, base_model=str(tmp_path / "nowhere")).save_pretrained(tmp_path / "merged", merged=True)
    site, update = next(iter(pack.lora.items()))
    wider = replace(update, down=torch.ones(update.rank, update.down.shape[1] + 1))
    with pytest.raises(EDLoRAFormatError, match="does not fit"):
        replace(pack, lora={**pack.lora, site: wider}).save_pretrained(tmp_path / "merged", merged=True)
    assert not (tmp_path / "merged").exists()


def test_a_write_that_fails_leaves_the_pack_that_was_there(
    pack: EDLoRA, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = pack.save_pretrained(tmp_path / "mine")
    before = path.read_bytes()

    def full(*args: object, **kwargs: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(StableDiffusionPipeline, "save_pretrained", full)
    with pytest.raises(OSError, match="No space left"):
        pack.save_pretrained(tmp_path / "mine", merged=True, overwrite=True)
    assert path.read_bytes() == before


def test_it_travels_over_the_hub_with_its_concepts(pack: EDLoRA, loopback_hub, tmp_path: Path) -> None:
    pack.push_to_hub("me/pair", merged=True, token=loopback_hub.token)
    pipe = MixOfShowPipeline.from_pretrained("me/pair", cache_dir=tmp_path / "cache")
    assert list(pipe.concepts) == ["<rex>", "<tom>"]


def test_a_component_that_is_a_link_is_replaced_and_what_it_leads_to_stays(pack: EDLoRA, tmp_path: Path) -> None:
    out, away = tmp_path / "out", tmp_path / "away"
    pack.save_pretrained(out, merged=True)
    (out / "unet").rename(away)
    (out / "unet").symlink_to(away)
    pack.save_pretrained(out, merged=True, overwrite=True)
    assert (out / "unet").is_dir()
    assert not (out / "unet").is_symlink()
    assert any(away.iterdir())


def test_parts_that_the_replaced_pipeline_alone_had_are_removed(pack: EDLoRA, tmp_path: Path) -> None:
    pack.save_pretrained(tmp_path / "out", merged=True)
    (tmp_path / "out" / "text_encoder_2").mkdir()
    other = replace(pack, embeddings={token: rows + 1 for token, rows in pack.embeddings.items()})
    other.save_pretrained(tmp_path / "out", merged=True, overwrite=True)
    assert not (tmp_path / "out" / "text_encoder_2").exists()
    assert (tmp_path / "out" / "text_encoder").is_dir()
