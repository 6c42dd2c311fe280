"""evaluate and compare as their users meet them."""

from __future__ import annotations

import dataclasses
import json
import warnings
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from typer.testing import CliRunner

import packs
import tiny
from diffusers_mixofshow import EDLoRA, cli
from diffusers_mixofshow.errors import ConceptError, ConfigurationError, MixOfShowWarning, PictureError
from diffusers_mixofshow.interop.concept_names import UNKNOWN_CLASS
from diffusers_mixofshow.interop.lora_files import write_lora
from diffusers_mixofshow.notes import read_note


QUICK = ("--steps", "1", "--pictures", "2", "--guidance", "1")


def run(*arguments: object):
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments], catch_exceptions=False)


def fill(folder: Path) -> Path:
    """Write a base, a CLIP, two ED-LoRAs, a pack of both, and photos of one."""
    from diffusers import StableDiffusionPipeline

    words = tiny.tokenizer()
    StableDiffusionPipeline(**tiny.components(), requires_safety_checker=False).save_pretrained(folder / "base")
    tiny.clip().save_pretrained(folder / "clip")
    words.save_pretrained(folder / "clip")
    for names in (("rex",), ("tom",), ("rex", "tom")):
        packs.random_pack(tiny.components(), *names).save_pretrained(folder / "-".join(names))
    (folder / "photos").mkdir()
    for index, colour in enumerate(("red", "blue")):
        Image.new("RGB", (40, 30), colour).save(folder / "photos" / f"{index}.png")
    (folder / "photos" / "notes.txt").write_text("a <TOK>")
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return fill(tmp_path_factory.mktemp("place"))


@pytest.fixture
def options(place, monkeypatch) -> tuple[str, ...]:
    monkeypatch.chdir(place)
    return ("--base", "base", "--metric-model", "clip", *QUICK)


def test_compare_shows_packs_side_by_side(options, place, tmp_path):
    arguments = ["compare", "rex", "tom", "rex-tom", *options, "--photos", "rex=photos"]
    result = run(*arguments, "--sheet", "out/sheet.png", "--record", "out/record.json")
    assert result.exit_code == 0
    assert "<tom>" in result.stdout
    assert "text" in result.stdout
    assert "looks" not in result.stdout  # CLIP reads no attributes
    record = json.loads((place / "out" / "record.json").read_text())
    assert {"command", "machine", "versions"} <= set(record["run"])
    assert record["settings"]["metric_model"] == "clip"
    assert [(row["concept"], row["pack"]) for row in record["rows"]] == [
        ("<rex>", "class word"), ("<rex>", "rex"), ("<rex>", "rex-tom"),
        ("<tom>", "class word"), ("<tom>", "tom"), ("<tom>", "rex-tom"), ("mean", "rex-tom"),
    ]  # fmt: skip
    assert [row["identity"] is None for row in record["rows"]] == [False] * 3 + [True] * 4
    assert record["photos"].keys() == {"<rex>"}
    photos = f"photos {record['photos']['<rex>']['alignment']:.3f}"
    cells = [" ".join(line.replace("│", " ").replace(" - ", " ").split()) for line in result.stdout.splitlines()]
    rows = [cell for cell in cells if cell.startswith(("<rex>", "<tom>", "class word", "rex", "tom", "photos"))]
    assert (rows[3], rows[4].split()[0]) == (photos, "<tom>")
    for name in ("text", "image", "drift", "class word", "photos"):
        assert f"\n  {name}: " in result.stdout
    for name in ("nearest", "looks"):  # no such column
        assert f"\n  {name}: " not in result.stdout
    Image.new("RGB", (40, 30)).save(tmp_path / "alone.png")
    result = run("evaluate", "rex", *options, "--photos", f"rex={tmp_path}", "--json")
    assert json.loads(result.stdout)["photos"] == {"<rex>": {"alignment": None, "attributes": None}}
    assert "photos" not in run("evaluate", "rex", *options, "--photos", f"rex={tmp_path}").stdout.partition("What")[0]
    with Image.open(place / "out" / "sheet.png") as sheet:
        assert sheet.height == 6 * 132 + 4
    note = read_note(place / "out" / "sheet.png")
    assert (note["base_model"], note["steps"], note["guidance"]) == ("base", 1, 1)
    assert list(note["rows"]) == [f"{row['concept']} {row['pack']}" for row in record["rows"][:-1]]
    prompts = ["a {} on a beach at noon", "a {} in front of a waterfall"]
    for label, subject in (("<rex> class word", "dog"), ("<rex> rex", "<rex>"), ("<tom> rex-tom", "<tom>")):
        assert note["rows"][label] == [
            {"prompt": prompt.format(subject), "seed": seed} for prompt, seed in zip(prompts, (1, 2), strict=True)
        ]


def test_evaluate_notes_its_numbers_in_the_pack_and_on_its_card(options, place, tmp_path):
    pack = packs.random_pack(tiny.components(), "rex", "tom", seed=1)
    pack.save_pretrained(tmp_path / "both")
    for name in ("rex", "tom"):
        packs.random_pack(tiny.components(), name, seed=1).save_pretrained(tmp_path / "both" / "sources" / name)
    paths = ("--metric-model", place / "clip", "--prompt", "a <TOK>, ink")
    result = run("evaluate", tmp_path / "both", *options, *paths, "--save", "--json")
    told = json.loads(result.stdout)
    assert told["settings"]["prompts"] == ["a <TOK>, ink"]
    assert {row["pack"] for row in told["rows"]} == {"class word", "sources/rex", "sources/tom", "both"}
    saved = EDLoRA.from_pretrained(tmp_path / "both")
    noted = saved.training["evaluation"]
    (row,) = [row for row in told["rows"] if (row["concept"], row["pack"]) == ("<tom>", "both")]
    assert noted["concepts"]["<tom>"] == {
        name: value for name, value in row.items() if name not in ("concept", "pack")
    }
    assert (noted["pictures"], noted["metric_model"]) == (2, "clip")  # and not where that lies on this disk
    assert (saved.digest, saved.training["note"]) == (pack.digest, "ünïcode")
    assert "| text-alignment |" in ModelCard.load(tmp_path / "both" / "README.md").text


def test_a_pushed_pack_takes_its_numbers_along(options, place, tmp_path, loopback_hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", loopback_hub.token)
    packs.random_pack(tiny.components(), "rex").save_pretrained(tmp_path / "rex")
    run("evaluate", tmp_path / "rex", *options, "--photos", "<rex>=photos", "--save")
    run("push", tmp_path / "rex")
    files = loopback_hub.repositories["me/edlora-rex"].branches["main"][-1][2]
    assert b"| image-alignment | text-alignment |" in files["README.md"]
    monkeypatch.chdir(place)
    result = run("evaluate", "me/edlora-rex", *options)
    assert "edlora-rex" in result.stdout


def test_toyland_needs_neither_photos_nor_a_metric_model(tmp_path, monkeypatch):
    from diffusers_mixofshow import toyland
    from diffusers_mixofshow.concepts import Concept
    from diffusers_mixofshow.families.layers import cross_attention_layers

    layers = cross_attention_layers(toyland.load_pipeline().unet)
    bobo = Concept.from_name("bobo", "critter", kind="character")
    embeddings = {token: torch.ones(len(layers), 128) for token in bobo.tokens}
    pack = EDLoRA(concepts=(bobo,), embeddings=embeddings, lora={}, base_model="toyland", layers=layers)
    pack.save_pretrained(tmp_path / "bobo")
    (row,) = json.loads(run("evaluate", tmp_path / "bobo", *QUICK, "--json").stdout)["rows"][1:]
    assert set(row["identity"]) == {"alignment", "attributes", "nearest"}
    assert row["identity"]["attributes"] is not None
    toyland.write_photos(toyland.CONCEPTS["bobo"], tmp_path / "photos", count=1)
    given = ("evaluate", tmp_path / "bobo", *QUICK, "--dry-run", "--photos", f"bobo={tmp_path / 'photos'}")
    with pytest.warns(MixOfShowWarning, match="the looks of <bobo> are not read.*without --photos they are"):
        assert "drawn of" not in run(*given).stdout
    assert "drawn of <bobo>" in run(*given[:-2]).stdout
    with warnings.catch_warnings():
        warnings.simplefilter("error", MixOfShowWarning)
        run(*given, "--metric-model", "no/clip")  # which reads no looks
        run(*given[:-2])


@pytest.mark.parametrize("base", ["toyland", "Toyland-XL", "toyland-sd3"])
def test_every_embedded_base_is_measured_by_toylands_judge_unless_another_is_asked_for(options, place, tmp_path, base):
    from diffusers_mixofshow.cli.measuring import _load_judge
    from diffusers_mixofshow.evaluation.toyland_judge import ToylandJudge

    update = packs.LowRank(down=torch.ones(2, 160), up=torch.ones(160, 2), alpha=2.0)
    ink = write_lora(tmp_path / "ink.safetensors", {"transformer.transformer_blocks.0.attn.to_q": update})
    measured = (str(ink), "--trigger", "ink=ink") if base == "toyland-sd3" else ("rex",)
    asked = ("evaluate", *measured, "--base", base, *QUICK, "--dry-run", "--json")
    assert json.loads(run(*asked).stdout)["metric model"].startswith("toyland, ")
    assert json.loads(run(*asked, "--metric-model", "clip").stdout)["metric model"].startswith("clip, ")
    assert isinstance(_load_judge("toyland"), ToylandJudge)


def test_a_dry_run_loads_and_writes_nothing(options, place, tmp_path):
    packs.random_pack(tiny.components(), "rex").save_pretrained(tmp_path / "rex")
    before = (tmp_path / "rex" / "edlora.safetensors").read_bytes()
    photos = ("--photos", "rex=photos")
    asked = ("evaluate", tmp_path / "rex", *options, *photos, "--base", "no/base", "--metric-model", "no/clip")
    told = json.loads(run(*asked, "--save", "--sheet", tmp_path / "x.png", "--dry-run", "--json").stdout)
    assert (told["pictures"], told["photos"], told["packs"]) == (6, "2 of <rex>", "rex: <rex>")
    assert told["metric model"].startswith("no/clip")
    assert str(tmp_path / "x.png") in told["writes"]
    assert (tmp_path / "rex" / "edlora.safetensors").read_bytes() == before
    assert not (tmp_path / "x.png").exists()


def test_settings_come_from_a_file(options, place, tmp_path):
    file = tmp_path / "settings.toml"
    file.write_text('[compare]\nbase = "base"\nmetric-model = "clip"\npictures = 3\nphotos = ["rex=photos"]\n')
    told = json.loads(run("--config", file, "compare", "rex", "rex-tom", "--dry-run", "--json").stdout)
    assert (told["pictures"], told["photos"]) == (3 * (1 + 2 + 3), "2 of <rex>")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--photos", "photos"], "not of the form 'concept=FOLDER'"),
        (["--photos", "kit=photos", "--photos", "rex=nowhere"], "no pack holds <kit>.*<rex>.*nowhere is no folder"),
        (["--photos", "rex=clip"], "clip holds no pictures"),
        (["--photos", "rex=photos", "--photos", "<rex>=photos"], "photos twice"),
        (["--prompt", "a dog"], "without <TOK>"),
        (["--metric-model", "base"], "metric model 'base' cannot be used"),
        (["--base", "./nowhere"], "base model './nowhere' cannot be loaded"),
        (["--own", "rex"], "Given twice: rex"),
        (["--own", "tom"], "tom holds <tom>, but the pack holds <rex>"),
        (
            ["--own", "tom", "--own", "rex-tom"],
            "tom holds <tom>.*rex-tom holds 2 concepts, expected one alone.*compare",
        ),
        (["--class-word", "dog"], "--class-word: 'dog' is not of the form 'concept=WORD', e.g. 'potter=man'"),
        (["--class-word", "rex="], "'rex=' is not of the form"),
        (["--class-word", "Rex=dog"], "no pack holds <Rex>.*Did you mean <rex>"),
        (["--class-word", "rex=dog", "--class-word", "<rex>=cat"], "<rex> has class-word twice"),
        (["--kind", "rex=dog"], "--kind: 'dog' is not one of character, pet, object, scene"),
    ],
)
def test_what_cannot_be_is_one_clear_error(options, more, message):
    with pytest.raises(ConfigurationError, match=message):
        run("evaluate", "rex", *options, *more)


def converted(folder: Path, *names: str) -> Path:
    """A pack as `convert` makes it of a file that tells no class word."""
    pack = packs.random_pack(tiny.components(), *names)
    unknown = [dataclasses.replace(concept, class_word=UNKNOWN_CLASS, kind="object") for concept in pack.concepts]
    dataclasses.replace(pack, concepts=tuple(unknown)).save_pretrained(folder)
    return folder


def test_a_pack_without_class_words_is_measured_with_those_of_the_own_ed_loras(options, place, tmp_path):
    """The own ED-LoRA's class word and kind decide, whichever pack is asked about; the file keeps what it told."""
    bare = converted(tmp_path / "rex-tom", "rex", "tom")
    own = ("--own", place / "rex", "--own", place / "tom", "--photos", f"rex={place / 'photos'}", "--json")
    told = [json.loads(run("evaluate", "rex-tom", *options, *own).stdout)["rows"]]
    with pytest.warns(MixOfShowWarning, match="<rex> is measured as 'dog', kind pet, as in rex; rex-tom has"):
        told.append(json.loads(run("evaluate", bare, *options, *own, "--save").stdout)["rows"])
    assert told[0] == told[1]
    assert {concept.class_word for concept in EDLoRA.from_pretrained(bare).concepts} == {UNKNOWN_CLASS}
    with pytest.raises(ConfigurationError, match=r"<rex> \(rex-tom\), <tom> \(rex-tom\)"):
        run("evaluate", bare, *options, "--dry-run")
    with pytest.raises(ConfigurationError, match=r"<tom> \(rex-tom\)"):
        run("compare", bare, "rex", *options)


def test_the_class_word_and_kind_that_are_asked_for_win(options, place):
    asked = ("compare", "rex", "rex-tom", *options, "--class-word", "rex=gray cat", "--kind", "<rex>=scene", "--json")
    settings = json.loads(run(*asked).stdout)["settings"]
    assert settings["class_words"] == {"<rex>": "gray cat", "<tom>": "dog"}
    assert any("a horse in a" in prompt for prompt in settings["prompts"])
    plain = json.loads(run(*asked[:3], *options, "--json").stdout)["settings"]
    assert not any("a horse in a" in prompt for prompt in plain["prompts"])


def test_a_photo_that_cannot_be_read_is_named_before_anything_is_loaded(options, tmp_path):
    (tmp_path / "x.png").write_bytes(b"no picture")
    with pytest.raises(PictureError, match=r"x\.png is no readable picture"):
        run("evaluate", "rex", *options, "--photos", f"rex={tmp_path}", "--metric-model", "/no/such/clip")


def test_numbers_are_noted_only_in_a_file_that_is_there(options, place, tmp_path):
    (place / "rex" / "edlora.safetensors").rename(tmp_path / "renamed.safetensors")
    try:
        with pytest.raises(ConfigurationError, match="--record"):
            run("evaluate", tmp_path / "renamed.safetensors", *options, "--save")
    finally:
        (tmp_path / "renamed.safetensors").rename(place / "rex" / "edlora.safetensors")


def test_a_complete_pipeline_is_no_pack(place, options):
    pack = packs.random_pack(tiny.components(), "rex")
    dataclasses.replace(pack, base_model=str(place / "base")).save_pretrained(place / "merged", merged=True)
    for source in ("merged", "merged/edlora.safetensors"):
        with pytest.raises(ConfigurationError, match="is a complete pipeline"):
            run("evaluate", source, *options)
        with pytest.raises(ConfigurationError, match="--base merged"):
            run("sample", "--concepts", source, "--prompt", "a <rex>")
    plan = run("sample", "--base", "merged", "--prompt", "a <rex>", "--dry-run")
    assert plan.exit_code == 0
    with pytest.raises(ConceptError, match="Unknown in the prompt"):
        run("sample", "--base", "base", "--prompt", "a <rex>", "--dry-run")
    (place / "base" / "new_concept_cfg.json").write_text("{}")  # as a model that the authors' code fused has it
    try:
        assert run("sample", "--base", "base", "--prompt", "a <rex>", "--dry-run").exit_code == 0
    finally:
        (place / "base" / "new_concept_cfg.json").unlink()


def test_a_pack_that_is_spelt_in_two_ways_is_given_twice(options, place):
    with pytest.raises(ConfigurationError, match="Given twice"):
        run("compare", "rex", "./rex/", *options)


def test_sources_that_a_pack_carries_are_found_beside_its_file_as_well(options, place):
    packs.random_pack(tiny.components(), "rex").save_pretrained(place / "rex-tom" / "sources" / "rex")
    told = [
        run("evaluate", source, *options, "--dry-run").stdout for source in ("rex-tom", "rex-tom/edlora.safetensors")
    ]
    assert ["sources/rex" in text for text in told] == [True, True]
