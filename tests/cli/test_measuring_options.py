"""evaluate and compare: every number beside one that is computed here, slowly, and what each option changes."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from PIL import Image
from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer
from typer.testing import CliRunner

from cli.commands import named_in, options_of
from cli.test_measuring import place  # noqa: F401
from diffusers_mixofshow import EDLoRA, MixOfShowPipeline, cli
from diffusers_mixofshow.errors import ConfigurationError, OverwriteError
from diffusers_mixofshow.evaluation.prompts import GENERAL_PROMPTS
from diffusers_mixofshow.notes import read_note


def run(*arguments: object) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        told = CliRunner().invoke(cli.app, [str(argument) for argument in arguments], catch_exceptions=False)
    return told.stdout


class Looker:
    """CLIP by its own classes, a picture or text at a time."""

    def __init__(self) -> None:
        self.clip, self.words = CLIPModel.from_pretrained("clip").eval(), CLIPTokenizer.from_pretrained("clip")

    @torch.no_grad()
    def sees(self, picture: Image.Image) -> torch.Tensor:
        side = self.clip.config.vision_config.image_size
        prepare = CLIPImageProcessor(size={"shortest_edge": side}, crop_size=side)
        return self._unit(self.clip.get_image_features(prepare(picture, return_tensors="pt").pixel_values))

    @torch.no_grad()
    def reads(self, text: str) -> torch.Tensor:
        ids = self.words([text], padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
        return self._unit(self.clip.get_text_features(ids))

    @staticmethod
    def _unit(features: Any) -> torch.Tensor:
        row = getattr(features, "pooler_output", features)[0].double()
        return row / row.norm()


def drawn(pipe: Any, prompts: list[str], *, steps: int, guidance: float, seed: int) -> list[Image.Image]:
    """One picture a prompt, the seeds counting on."""
    return pipe(
        prompt=prompts,
        negative_prompt=[""] * len(prompts),
        num_inference_steps=steps,
        guidance_scale=guidance,
        generator=[torch.Generator().manual_seed(seed + number) for number in range(len(prompts))],
    ).images


def mean(values: Any) -> float:
    values = [float(value) for value in values]
    return sum(values) / len(values)


def test_every_number_is_that_of_a_slow_computation(place, monkeypatch, tmp_path) -> None:  # noqa: F811
    """Text-alignment by CLIPScore with its prefix, likeness, retention, drift, and their means over concepts."""
    monkeypatch.chdir(place)
    settings = {"steps": 2, "guidance": 3.0, "seed": 7}
    asked = ("--base", "base", "--metric-model", "clip", "--steps", "2", "--guidance", "3", "--seed", "7")
    asked += ("--pictures", "3", "--prompt", "a <TOK>, ink", "--prompt", "my <TOK>", "--class-word", "tom=gray cat")
    pipe = MixOfShowPipeline.from_pretrained("base")
    pipe.set_progress_bar_config(disable=True)
    words, held = {"<rex>": "dog", "<tom>": "gray cat"}, {"rex": ["<rex>"], "tom": ["<tom>"]}
    held["rex-tom"] = ["<rex>", "<tom>"]

    def prompts(subject: str) -> list[str]:
        return [f"a {subject}, ink", f"my {subject}", f"a {subject}, ink"]

    files: dict[str, list[Path]] = {}
    for pack, (name, *others) in held.items():
        if not others:  # as photos, pictures of its own ED-LoRA: then that has gained much over the class word
            pipe.load_edlora(pack)
            files[name] = [tmp_path / pack / f"{number}.png" for number in range(3)]
            (tmp_path / pack).mkdir()
            for file, picture in zip(
                files[name], drawn(pipe, prompts(name), **settings | {"seed": 7 + len(files)}), strict=True
            ):
                picture.crop((0, 1, 32, 31)).save(file)
            pipe.unload_edlora()
    photos = ("--photos", f"rex={tmp_path / 'rex'}", "--photos", f"tom={tmp_path / 'tom'}")
    told = json.loads(run("compare", "rex", "tom", "rex-tom", *asked, *photos, "--json"))
    rows = {(row["concept"], row["pack"]): row for row in told["rows"]}

    looker = Looker()
    photos = {name: [looker.sees(Image.open(file)) for file in each] for name, each in files.items()}

    def numbers(pictures: list[Image.Image], name: str) -> dict[str, float]:
        seen = [looker.sees(picture) for picture in pictures]
        texts = [looker.reads(f"A photo depicts {text}") for text in prompts(words[name])]
        likeness = {other: [mean(one @ photo for photo in each) for one in seen] for other, each in photos.items()}
        return {
            "text": mean(2.5 * max(float(text @ one), 0) for text, one in zip(texts, seen, strict=True)),
            "image": mean(likeness[name]),
            "nearest": mean(all(each[i] <= likeness[name][i] for each in likeness.values()) for i in range(3)),
        }

    bare = {name: drawn(pipe, prompts(word), **settings) for name, word in words.items()}
    expected = {(name, "class word"): numbers(bare[name], name) for name in words}
    for pack, names in held.items():
        pipe.load_edlora(pack)
        for name in names:
            numbered = expected[name, pack] = numbers(drawn(pipe, prompts(name), **settings), name)
            changed = drawn(pipe, prompts(words[name]), **settings)
            pairs = zip(bare[name], changed, strict=True)
            numbered["drift"] = mean(1 - looker.sees(one) @ looker.sees(other) for one, other in pairs)
        pipe.unload_edlora()
    expected["mean", "rex-tom"] = {
        key: mean([expected[name, "rex-tom"][key] for name in words]) for key in ("text", "image", "nearest", "drift")
    }
    assert rows.keys() == expected.keys()
    for key, numbered in expected.items():
        row = rows[key]
        found = {"text": row["text_alignment"], **{"image": row["identity"]["alignment"]}, "drift": row["drift"]}
        found["nearest"] = row["identity"]["nearest"]
        assert found == {name: pytest.approx(numbered.get(name), abs=6e-5) for name in found}, key
        assert row["drift"] is None or row["drift"] > 2e-4
    gained = [
        kept_as_expected(rows[name, "rex-tom"], expected, [name] if name in words else list(words))
        for name in (*words, "mean")
    ]
    # Or else nothing was compared. The random weights of older versions are others, of which none gains.
    assert any(gained) or Version(transformers.__version__) < Version("5.6")
    assert [row["retention"] for (_, pack), row in rows.items() if pack != "rex-tom"] == [None] * 4


def kept_as_expected(row: dict[str, Any], expected: dict[tuple[str, str], dict[str, float]], names: list[str]) -> bool:
    """Check what the pack of both keeps of some concepts; whether their own ED-LoRAs gained anything at all."""
    own = mean([expected[name, name[1:-1]]["image"] for name in names])
    floor = mean([expected[name, "class word"]["image"] for name in names])
    kept = mean([expected[name, "rex-tom"]["image"] for name in names])
    if own <= floor:
        assert row["retention"]["alignment"] is None
        return False
    assert row["retention"]["alignment"] == pytest.approx((kept - floor) / (own - floor), abs=1e-4)
    return True


NUMBERS = ("--base", "base", "--metric-model", "clip", "--pictures", "2", "--steps", "1", "--guidance", "2.5")
TOLD = {
    "base_model": "base",
    "metric_model": "clip",
    "class_words": {"<rex>": "gray cat", "<tom>": "dog"},
    "pictures": 2,
    "steps": 1,
    "guidance": 2.5,
    "seed": 9,
}
GIVEN = (*NUMBERS, "--seed", "9", "--class-word", "rex=gray cat", "--photos", "rex=photos")
PROMPTS = ("--prompt", "a <TOK>, ink", "--prompt", "my <TOK>")
KINDS = ("--kind", "rex=scene", "--kind", "tom=object")
VERBS = {
    "compare": ("rex", "tom", "rex-tom"),
    "evaluate": ("rex-tom", "--own", "rex", "--own", "tom"),
}


def test_both_verbs_measure_what_they_were_asked_for(place, monkeypatch, tmp_path) -> None:  # noqa: F811
    monkeypatch.chdir(place)
    rows = []
    for verb, sources in VERBS.items():
        sheet, record = tmp_path / f"{verb}.png", tmp_path / f"{verb}.json"
        files = ("--sheet", sheet, "--record", record)
        told = json.loads(run(verb, *sources, *GIVEN, *PROMPTS, *files, "--json"))
        assert told["settings"] == TOLD | {"prompts": ["a <TOK>, ink", "my <TOK>"]}
        written = json.loads(record.read_text())
        assert written.pop("run")["command"]
        assert written == told
        note = read_note(sheet)
        assert (note["base_model"], note["steps"], note["guidance"]) == ("base", 1, 2.5)
        assert note["rows"]["<rex> rex-tom"] == [
            {"prompt": "a <rex>, ink", "seed": 9},
            {"prompt": "my <rex>", "seed": 10},
        ]
        assert note["rows"]["<rex> class word"][1] == {"prompt": "my gray cat", "seed": 10}
        with pytest.raises(OverwriteError, match=rf"{verb}\.png, .*{verb}\.json"):
            run(verb, *sources, *GIVEN, *files)
        plan = json.loads(run(verb, *sources, *GIVEN, *files, "--dry-run", "--json"))
        assert plan["replaces"] == f"{sheet}, {record}; asks for --overwrite"
        assert plan["writes"] == f"{sheet}, {record}"
        rows.append(told["rows"])
    assert rows[0] == rows[1]
    table = run("compare", "rex", *GIVEN, *PROMPTS, "--record", record, "--overwrite")
    assert f"Wrote {record}" in table
    assert "text" in table
    assert [row["pack"] for row in json.loads(record.read_text())["rows"]] == ["class word", "rex"]


@pytest.mark.parametrize("verb", VERBS)
def test_the_kind_chooses_the_prompts_and_defaults_are_as_the_help_says(place, monkeypatch, verb) -> None:  # noqa: F811
    monkeypatch.chdir(place)
    quick = ("--base", "base", "--metric-model", "clip", "--pictures", "1", "--steps", "1")
    told = json.loads(run(verb, *VERBS[verb], *quick, "--json"))["settings"]
    assert (told["guidance"], told["seed"], told["class_words"]) == (7.5, 1, {"<rex>": "dog", "<tom>": "dog"})
    assert told["prompts"] == list(GENERAL_PROMPTS["pet"])
    asked = json.loads(run(verb, *VERBS[verb], *quick, *KINDS, "--json"))["settings"]
    assert asked["prompts"] == list(dict.fromkeys([*GENERAL_PROMPTS["scene"], *GENERAL_PROMPTS["object"]]))
    assert asked | {"prompts": told["prompts"]} == told
    plan = json.loads(run(verb, *VERBS[verb], "--dry-run", "--json"))
    pictures = 12 * (1 + 2 + 2 + 3)
    assert (plan["pictures"], plan["photos"], plan["writes"]) == (pictures, "none given", "nothing")
    assert plan["U-Net runs"] == f"{20 * pictures} for single pictures, each with and without guidance"
    assert plan["base model"].startswith("someone/tiny, ")
    assert plan["metric model"].startswith("openai/clip-vit-base-patch32, ")


def test_evaluate_saves_only_when_asked_and_needs_no_leave_for_it(place, monkeypatch, tmp_path) -> None:  # noqa: F811
    monkeypatch.chdir(place)
    EDLoRA.from_pretrained("rex").save_pretrained(tmp_path / "rex")
    before = (tmp_path / "rex" / "edlora.safetensors").read_bytes()
    run("evaluate", tmp_path / "rex", *GIVEN, *PROMPTS)
    assert (tmp_path / "rex" / "edlora.safetensors").read_bytes() == before
    plan = run("evaluate", tmp_path / "rex", *GIVEN, "--save", "--dry-run")
    assert f"\nwrites: {tmp_path / 'rex'}\nreplaces: nothing\n" in plan
    run("evaluate", tmp_path / "rex", *GIVEN, *PROMPTS, "--save")
    noted = EDLoRA.from_pretrained(tmp_path / "rex").training["evaluation"]
    assert {name: noted[name] for name in TOLD} == TOLD | {"class_words": {"<rex>": "gray cat"}}


@pytest.mark.parametrize("verb", VERBS)
def test_every_option_of_both_verbs_is_in_one_of_these_tests(verb: str) -> None:
    alone = {"--sheet", "--record", "--overwrite", "--dry-run", "--json"}
    alone |= {"--own", "--save", "source"} if verb == "evaluate" else {"sources"}
    alone |= {"--trigger"}  # of plain LoRAs, see test_measuring_plain.py
    assert named_in(GIVEN, PROMPTS, KINDS) | alone == options_of(verb)


@pytest.mark.parametrize("verb", VERBS)
def test_numbers_that_cannot_be_are_refused(verb: str) -> None:
    with pytest.raises(ConfigurationError, match="Got --guidance nan; expected a number"):
        run(verb, *VERBS[verb], "--guidance", "nan")
    assert "--seed" in CliRunner().invoke(cli.app, [verb, *VERBS[verb], "--seed", str(10**22)]).stderr
    assert "--seed" in CliRunner().invoke(cli.app, ["demo", "--seed", str(10**22)]).stderr
