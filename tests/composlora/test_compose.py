"""ComposLoRA's command, end to end on stand-ins in the published layout: a tiny pipeline and random LoRAs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors.torch import save_file

import tiny
from benchmarks.composlora.compose import main
from benchmarks.composlora.methods import METHODS, _predicting_apart, loaded
from benchmarks.composlora.testbed import COUNTS, read_testbed
from diffusers_mixofshow.families.layers import linear_layers


CATEGORIES = {"character": 3, "clothing": 2, "style": 2, "background": 2, "object": 2}
PROMPTS = """
def get_prompt(style):
    if style == "anime":
        prompt = "drawn"
        negative_prompt = "photo"
    else:
        prompt = "photo"
        negative_prompt = "drawn"
    return prompt, negative_prompt

raise RuntimeError("nobody runs this")
"""


@pytest.fixture(scope="module")
def testbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clone of the repository with the LoRAs unpacked, in kohya's names; base and judge lie beside them."""
    folder = tmp_path_factory.mktemp("testbed")
    pipe = StableDiffusionPipeline(**tiny.components())
    pipe.save_pretrained(folder / "base")
    tiny.clip().save_pretrained(folder / "clip")
    tiny.tokenizer().save_pretrained(folder / "clip")
    (folder / "utils.py").write_text(PROMPTS)
    layers = linear_layers(pipe.components)
    sites = [site for site in layers if ".attn2.to_" in site or ".self_attn." in site]
    generator = torch.Generator().manual_seed(0)
    for style in ("anime", "reality"):
        told: dict[str, list[dict[str, object]]] = {}
        for category, count in CATEGORIES.items():
            names = [f"{category}_{number + 1}" for number in range(count)]
            told[category] = [{"id": one, "name": one, "trigger": [one, "nice"], "url": ""} for one in names]
            for name in names:
                tensors = {}
                for site in sites:
                    start = site.replace("text_encoder.", "lora_te.").replace("unet.", "lora_unet.").replace(".", "_")
                    shape = layers[site].out_features, layers[site].in_features
                    tensors |= {
                        f"{start}.lora_down.weight": torch.randn(2, shape[1], generator=generator) * 0.1,
                        f"{start}.lora_up.weight": torch.randn(shape[0], 2, generator=generator) * 0.1,
                        f"{start}.alpha": torch.tensor(1.0),
                    }
                path = folder / "models" / "lora" / style / f"{name}.safetensors"
                path.parent.mkdir(parents=True, exist_ok=True)
                save_file(tensors, path)
        (folder / f"{style}_lora_info.json").write_text(json.dumps(told))
    return folder


def test_all_sets_are_the_published_480(testbed: Path) -> None:
    styles = [read_testbed(testbed, style) for style in ("anime", "reality")]
    assert [len(list(styles[0].sets(count))) for count in COUNTS] == [24, 72, 96, 48]
    assert sum(len(list(style.sets(count))) for style in styles for count in COUNTS) == 480
    assert sum(len(style.elements) for style in styles) == 22
    assert (styles[0].prefix, styles[0].negative) == ("drawn", "photo")
    (first, *_) = styles[1].sets(2)
    assert styles[1].prompt(first) == "photo, character_1, nice, clothing_1, nice"


def test_the_command_draws_measures_and_writes_pairs(
    testbed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    work, written = tmp_path / "work", tmp_path / "record.json"
    small = ["--steps", "6", "--size", "32", "32", "--counts", "2", "3", "--limit", "1"]
    own = ["--base", str(testbed / "base"), "--judge", str(testbed / "clip"), "--device", "cpu"]
    given = ["--testbed", str(testbed), "--work", str(work), "--record", str(written), *small, *own]
    main(given)
    told = capsys.readouterr().out
    results = json.loads(written.read_text())["results"]
    assert {count: list(rows) for count, rows in results.items()} == {"2": list(METHODS), "3": list(METHODS)}
    for method, row in results["2"].items():
        assert row["pictures"] == 1, method
        assert f"| {method} | {row['clip_score']:.3f}, {row['image_alignment']:.3f} |" in told
    names = {path.name for path in (work / "output_reality" / "2_elements").iterdir()}
    assert names == {f"{method}_character_1_clothing_1.png" for method in METHODS}
    pictures = {name: Image.open(work / "output_reality" / "2_elements" / name).tobytes() for name in names}
    assert len(set(pictures.values())) == len(METHODS)  # every method draws something of its own
    pair = work / "pairs" / "switch-vs-closed-form_reality" / "3_elements"
    assert {path.name for path in pair.iterdir()} == {
        f"{name}_character_1_clothing_1_style_1.png" for name in ("merge", "composite")
    }
    main(given)  # nothing is drawn again
    assert "seconds_a_picture" not in json.loads(written.read_text())["results"]["2"]["merge"]
    with pytest.raises(SystemExit, match=r"other settings.*plan_reality\.json"):
        main([*given, "--steps", "8"])


def test_a_testbed_that_is_not_whole_is_told_at_once(testbed: Path, tmp_path: Path) -> None:
    given = ["--work", str(tmp_path / "work"), "--style", "anime"]
    with pytest.raises(SystemExit, match=r"no clone of .*anime_lora_info\.json.*utils\.py"):
        main(["--testbed", str(tmp_path), *given])
    for name in ("anime_lora_info.json", "utils.py"):
        (tmp_path / name).write_bytes((testbed / name).read_bytes())
    with pytest.raises(SystemExit, match=r"lacks character_1\.safetensors, .*ComposLoRA\.zip"):
        main(["--testbed", str(tmp_path), *given])


def test_the_papers_methods_are_what_it_says(testbed: Path, tmp_path: Path) -> None:
    """Merge sums the updates; composite is the mean of single predictions; switch turns every five steps."""
    bed, pipe = read_testbed(testbed, "reality"), StableDiffusionPipeline.from_pretrained(testbed / "base")
    pair = next(bed.sets(2))
    names = [element.id for element in pair]
    latents, time = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1)), torch.tensor(500)
    states = torch.randn(1, 77, 32, generator=torch.Generator().manual_seed(2))

    def predicted() -> torch.Tensor:
        with torch.no_grad():
            return pipe.unet(latents, time, encoder_hidden_states=states, return_dict=False)[0]

    with loaded(pipe, bed, pair, "merge", None, tmp_path) as merge:  # type: ignore[arg-type]
        assert merge == {"cross_attention_kwargs": {"scale": 0.8}}
        assert pipe.get_active_adapters() == names
        singles = []
        for name in names:
            pipe.set_adapters(name)
            singles.append(predicted())
        with _predicting_apart(pipe, names):
            torch.testing.assert_close(predicted(), (singles[0] + singles[1]) / 2)
    with loaded(pipe, bed, pair, "switch", None, tmp_path) as switch:  # type: ignore[arg-type]
        active = [tuple(pipe.get_active_adapters())]
        for step in range(12):
            switch["callback_on_step_end"](pipe, step, None, {})
            active.append(tuple(pipe.get_active_adapters()))
    assert active == [*[(names[0],)] * 6, *[(names[1],)] * 5, *[(names[0],)] * 2]
    assert not pipe.get_list_adapters()
