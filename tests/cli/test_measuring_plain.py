"""evaluate and compare of plain LoRAs and of what was fused from them: they have no concepts, but trigger words."""

from __future__ import annotations

import json
import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from huggingface_hub import ModelCard
from PIL import Image
from typer.testing import CliRunner

import packs
import tiny
from cli.test_measuring import QUICK, fill
from diffusers_mixofshow import FusedPack, FusionSource, GradientFuser, LoRASource, MixOfShowPipeline, cli, toyland
from diffusers_mixofshow.cli.measuring import _print_table
from diffusers_mixofshow.errors import ConceptError, ConfigurationError, FusionError, MixOfShowWarning
from diffusers_mixofshow.evaluation.clip_judge import ClipJudge
from diffusers_mixofshow.evaluation.identity import Identity
from diffusers_mixofshow.evaluation.packs import Reference, Row, evaluate_packs
from diffusers_mixofshow.evaluation.sampling import Sampling
from diffusers_mixofshow.families.anima import ANIMA
from diffusers_mixofshow.families.layers import linear_layers
from diffusers_mixofshow.fusion.pack import read_plain_pack
from diffusers_mixofshow.interop.lora_files import write_lora
from diffusers_mixofshow.interop.opening import open_edlora
from diffusers_mixofshow.interop.trigger_words import find_shared_words, trigger_words_of_sources
from diffusers_mixofshow.notes import read_note
from diffusers_mixofshow.sampling.loading import load_base


PROMPTS = {"dog": ["photo of sks dog", "a sks dog in the snow"], "ink": ["a house, inkwash style"]}


def write(path: Path, seed: int, **metadata: str) -> Path:
    return write_lora(path, dict(packs.random_pack(tiny.components(), seed=seed).lora), metadata)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return fill(tmp_path_factory.mktemp("place"))


@pytest.fixture
def asked(place, tmp_path, monkeypatch) -> tuple[str, ...]:
    """Two LoRAs fused into a pack that carries them, and the options of a quick measurement."""
    monkeypatch.chdir(tmp_path)
    files = {"dog": write(tmp_path / "dog.safetensors", 1), "ink": write(tmp_path / "ink.safetensors", 2)}
    fused = GradientFuser().fuse([LoRASource(files[name], PROMPTS[name]) for name in files], method="average")
    fused.save_pretrained(tmp_path / "both", sources=True)
    (tmp_path / "photos").symlink_to(place / "photos")
    return ("--base", str(place / "base"), "--metric-model", str(place / "clip"), *QUICK)


def run(*arguments: object) -> str:
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments], catch_exceptions=False).stdout


def test_a_pack_of_plain_loras_is_measured_by_its_trigger_words_alone(asked) -> None:
    with pytest.warns(MixOfShowWarning, match="dog, ink: without a class word .*--class-word dog=WORD"):
        told = json.loads(run("evaluate", "both", *asked, "--sheet", "x.png", "--json"))
    assert [(row["concept"], row["pack"]) for row in told["rows"]] == [
        ("dog", "sources/dog"), ("dog", "both"), ("ink", "sources/ink"), ("ink", "both"), ("mean", "both"),
    ]  # fmt: skip
    assert all(row["text_alignment"] > 0 for row in told["rows"])
    assert {row[name] for row in told["rows"] for name in ("identity", "retention", "drift")} == {None}
    assert told["settings"]["trigger_words"] == {"dog": "sks dog", "ink": "house, inkwash style"}
    assert told["settings"]["class_words"] == {}
    prompts = [each["prompt"] for each in read_note(Path("x.png"))["rows"]["dog both"]]
    assert prompts == ["a sks dog on a beach at noon", "a sks dog in front of a waterfall"]


def test_class_words_photos_and_own_files_add_what_they_allow(asked) -> None:
    words = ("--class-word", "dog=dog", "--kind", "dog=pet", "--photos", "dog=photos", "--trigger", "ink=inkwash")
    with pytest.warns(MixOfShowWarning, match="ink: without a class word"):
        told = json.loads(run("evaluate", "both", *asked, *words, "--own", "dog.safetensors", "--json"))
    rows = {(row["concept"], row["pack"]): row for row in told["rows"]}
    assert list(rows) == [
        ("dog", "class word"), ("dog", "dog.safetensors"), ("dog", "both"), ("ink", "both"), ("mean", "both")
    ]  # fmt: skip
    assert rows["dog", "both"]["identity"]["alignment"] is not None
    assert set(rows["dog", "both"]["retention"]) == {"alignment", "attributes"}
    assert rows["dog", "both"]["drift"] is not None
    assert rows["ink", "both"]["drift"] is rows["ink", "both"]["identity"] is None
    assert told["settings"]["class_words"] == {"dog": "dog"}
    assert told["settings"]["trigger_words"] == {"dog": "sks dog", "ink": "inkwash"}


def test_an_own_file_of_another_name_is_known_by_its_content(asked) -> None:
    Path("dog.safetensors").rename("pytorch_lora_weights.safetensors")
    own = ("--own", "pytorch_lora_weights.safetensors", "--class-word", "dog=dog", "--class-word", "ink=drawing")
    rows = json.loads(run("evaluate", "both", *asked, *own, "--json"))["rows"]
    assert ("dog", "pytorch_lora_weights.safetensors") in [(row["concept"], row["pack"]) for row in rows]
    write(Path("cat.safetensors"), 3)
    with pytest.raises(ConfigurationError, match=r"cat\.safetensors holds cat, but the pack holds dog, ink"):
        run("evaluate", "both", *asked, "--own", "cat.safetensors")


def test_numbers_of_a_pack_of_plain_loras_are_saved_beside_its_sources(asked) -> None:
    before = FusedPack.from_pretrained("both")
    words = ("--class-word", "dog=dog", "--class-word", "ink=drawing")
    told = json.loads(run("evaluate", "both", *asked, *words, "--save", "--json"))
    saved = read_plain_pack("both")
    assert saved is not None
    entries = saved.training["evaluation"]["concepts"]
    assert entries["dog"]["text_alignment"] == next(
        row["text_alignment"] for row in told["rows"] if (row["concept"], row["pack"]) == ("dog", "both")
    )
    after = FusedPack.from_pretrained("both")  # with the sources that it carries
    assert after.digest == before.digest
    assert [one.name for one in after.sources] == ["dog", "ink"]
    assert "| text-alignment |" in ModelCard.load("both/README.md").text
    write(Path("dog2.safetensors"), 1)
    with pytest.raises(ConfigurationError, match="--save writes the numbers"):
        run("evaluate", "dog2.safetensors", *asked, "--trigger", "dog2=x", "--save")


def test_a_single_plain_lora_is_compared_with_the_pack(asked) -> None:
    write(Path("dog.safetensors"), 1, **{"modelspec.trigger_phrase": "sks dog"})
    words = ("--class-word", "dog=dog", "--class-word", "ink=drawing")
    told = json.loads(run("compare", "dog.safetensors", "both", *asked, *words, "--json"))
    assert ("dog", "dog.safetensors") in [(row["concept"], row["pack"]) for row in told["rows"]]
    plan = json.loads(run("compare", "dog.safetensors", *asked, "--class-word", "dog=dog", "--dry-run", "--json"))
    assert plan["prompts say"] == "dog: sks dog (class word dog)"
    assert plan["pictures"] == 2 * 3


def test_what_nobody_knows_is_asked_for_in_one_error(asked) -> None:
    write(Path("x.safetensors"), 3)
    with pytest.raises(ConfigurationError, match=r"trigger words of x are not known.*--trigger x=WORDS"):
        run("evaluate", "x.safetensors", *asked)
    with pytest.raises(ConfigurationError, match=r"--trigger: no pack holds <y> \(they hold dog, ink\)"):
        run("evaluate", "both", *asked, "--trigger", "y=sks")
    packs.random_pack(tiny.components(), "rex").save_pretrained("rex")
    with pytest.raises(ConfigurationError, match="--trigger: <rex> is a concept, which prompts call <rex>"):
        run("evaluate", "rex", *asked, "--trigger", "rex=sks")


def test_a_plain_lora_beside_concepts_is_measured_too_if_its_words_are_known(asked) -> None:
    rex = FusionSource(packs.random_pack(tiny.components(), "rex"))
    for prompts in (["sks dog", "a sks dog"], ["one", "two"]):
        fused = GradientFuser().fuse([rex, LoRASource("dog.safetensors", prompts)], method="average")
        fused.save_pretrained("mixed", overwrite=True)
        with pytest.warns(MixOfShowWarning, match="dog"):
            rows = json.loads(run("evaluate", "mixed", *asked, "--json"))["rows"]
        expected = ["<rex>", "dog"] if "sks dog" in prompts else ["<rex>"]
        assert [row["concept"] for row in rows if row["pack"] == "mixed" and row["concept"] != "mean"] == expected


def test_packs_of_plain_loras_are_measured_in_python(asked, place) -> None:
    pipe = MixOfShowPipeline.from_pretrained(place / "base", safety_checker=None)
    told = evaluate_packs(
        pipe,
        {"both": read_plain_pack("both")},
        ClipJudge.load(str(place / "clip")),
        {"dog": reference(place / "photos")},
        templates=lambda concept: ["a <TOK>"],
        sampling=Sampling(steps=1, guidance_scale=1.0),
        count=1,
    )
    assert [(row.concept, row.identity is None) for row in told.rows] == [
        ("dog", False), ("ink", True), ("mean", True)
    ]  # fmt: skip
    plain = pipe("a sks dog", num_inference_steps=1, guidance_scale=1.0, generator=torch.manual_seed(1)).images[0]
    pipe.load_edlora("both")
    loaded = pipe("a sks dog", num_inference_steps=1, guidance_scale=1.0, generator=torch.manual_seed(1)).images[0]
    measured = told.pictures["dog", "both"][0]
    assert measured.tobytes() == loaded.tobytes() != plain.tobytes()


def reference(folder: Path) -> Reference:
    photos = [Image.open(path).convert("RGB") for path in sorted(folder.glob("*.png"))]
    return Reference(photos=photos)


def test_plain_loras_of_a_base_that_draws_no_concepts_are_measured_with_its_own_pipeline(
    tmp_path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    pipe = load_base("toyland-sd3", "cpu", "float32", concepts=False)
    sites = [site for site in linear_layers(pipe.components) if "attn.to_q" in site]
    generator = torch.Generator().manual_seed(0)
    files = []
    for name in ("bobo", "rex"):
        lora = {
            site: packs.LowRank(
                down=torch.randn(2, 160, generator=generator), up=torch.randn(160, 2, generator=generator), alpha=2.0
            )
            for site in sites
        }
        files.append(write_lora(tmp_path / f"{name}.safetensors", lora))
    words = {"bobo": "bobo critter", "rex": "rex dog"}
    sources = [LoRASource(file, [words[file.stem], f"a {words[file.stem]}"]) for file in files]
    GradientFuser().fuse(sources, method="average").save_pretrained("both")
    told = run("evaluate", "both", *QUICK, "--class-word", "bobo=critter", "--class-word", "rex=dog", "--json")
    rows = {(row["concept"], row["pack"]): row for row in json.loads(told)["rows"]}
    assert rows["bobo", "both"]["identity"]["attributes"] is not None
    assert rows["bobo", "both"]["drift"] > 0
    assert json.loads(told)["settings"]["base_model"] == "toyland-sd3"


@pytest.fixture
def of_sd3(tmp_path, monkeypatch) -> Path:
    """A pack fused of one plain LoRA for the base toyland-sd3, in the current folder."""
    monkeypatch.chdir(tmp_path)
    sites = [f"transformer.transformer_blocks.{number}.attn.to_q" for number in range(2)]
    lora = {site: packs.LowRank(down=torch.randn(2, 160), up=torch.randn(160, 2), alpha=2.0) for site in sites}
    source = LoRASource(write_lora(tmp_path / "rex.safetensors", lora), ["a rex dog", "rex dog in the snow"])
    fused = GradientFuser().fuse([source], method="average")
    replace(fused, base_model="toyland-sd3").save_pretrained("pack")
    return tmp_path


SD1 = packs.LowRank(down=torch.ones(1, 768), up=torch.ones(1280, 1), alpha=1.0)
SD3_PROMPT = ("sample", "--prompt", "a dog in the snow", "--steps", "2")


def test_a_base_that_draws_no_concepts_draws_prompts_with_plain_loras(of_sd3) -> None:
    run(*SD3_PROMPT, "--concepts", "pack", "--count", "2", "--output", "x.png")
    run(*SD3_PROMPT, "--base", "toyland-sd3", "--seed", "1", "--output", "bare.png")
    run(*SD3_PROMPT, "--concepts", "pack", "--lora-scale", "0", "--seed", "1", "--output", "off.png")
    run("--config", "x-1.png", "sample", "--output", "again.png")
    pictures = {name: Image.open(f"{name}.png").tobytes() for name in ("x-0", "x-1", "again", "bare", "off")}
    assert pictures["bare"] == pictures["off"]
    assert len({pictures[name] for name in ("x-0", "x-1", "bare")}) == 3
    pairs = zip(pictures["x-1"], pictures["again"], strict=True)  # of another batch size, so that rounding differs
    assert max(abs(one - other) for one, other in pairs) <= 4
    pipe = toyland.load_pipeline(base_model="toyland-sd3")
    own = pipe("a dog in the snow", num_inference_steps=2, guidance_scale=3.0, generator=torch.manual_seed(1)).images
    assert own[0].tobytes() == pictures["bare"]
    run(*SD3_PROMPT, "--base", "toyland-sd3", "--width", "72", "--output", "wide.png")
    assert Image.open("wide.png").size == (72, 64)


def test_what_the_pipeline_of_diffusers_refuses_is_one_clear_error(of_sd3, monkeypatch) -> None:
    def refuse(*_: object, **named: object) -> None:
        raise ValueError("`width` has to be divisible by 16")

    monkeypatch.setattr(StableDiffusion3Pipeline, "check_inputs", refuse)
    with pytest.raises(ConfigurationError, match=r"StableDiffusion3Pipeline .* cannot draw this: .*divisible by"):
        run(*SD3_PROMPT, "--base", "toyland-sd3", "--output", "never.png")


@pytest.mark.parametrize(
    ("more", "refused"),
    [
        (("--region", "0,0,1,1:a dog"), "regions"),
        (("--image", "own.png"), r"pictures to start from \(--image\)"),
        (("--concepts", "ed", "--base", "toyland-sd3"), "concepts"),
    ],
)
@pytest.mark.parametrize("way", ["--dry-run", "--json"])
def test_what_such_a_base_does_not_draw_is_refused_before_it_is_loaded(
    of_sd3, monkeypatch, more, refused, way
) -> None:
    monkeypatch.setattr(
        "diffusers_mixofshow.sampling.drawing.load_base", lambda *given, **named: pytest.fail("loaded")
    )
    Image.new("RGB", (64, 64)).save("own.png")
    packs.random_pack(tiny.components(), "rex").save_pretrained("ed")
    expected = (
        f"'toyland-sd3' is of Stable Diffusion 3, with which no {refused} are drawn, only prompts.*Leave them out"
    )
    with pytest.raises(ConfigurationError, match=expected):
        run(*SD3_PROMPT, "--concepts", "pack", *more, way)
    with pytest.raises(ConceptError, match="<rex>"):
        run("sample", "--prompt", "a <rex>", "--concepts", "pack", way)


@pytest.mark.parametrize("way", ["--dry-run", "--json"])
@pytest.mark.parametrize(
    "asked", [("sample", "--prompt", "x", "--concepts", "pack"), ("evaluate", "pack"), ("compare", "pack", "copy")]
)
def test_a_base_of_another_family_is_refused_before_it_is_loaded(of_sd3, monkeypatch, asked, way) -> None:
    for module in ("sampling.drawing", "cli.measuring"):
        load = f"diffusers_mixofshow.{module}.load_base"
        monkeypatch.setattr(load, lambda *given, **named: pytest.fail("loaded"))
    shutil.copytree("pack", "copy")
    told = r"into 'toyland': the base model is one of Stable Diffusion, whose .* pack for Stable Diffusion 3.*; give"
    with pytest.raises(ConfigurationError, match=told):
        run(*asked, "--base", "toyland", way)
    write_lora(Path("dog.safetensors"), {"unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k": SD1})
    with pytest.raises(
        ConfigurationError, match=r"XL, whose layers .* those of dog\.safetensors for Stable Diffusion;"
    ):
        run("sample", "--prompt", "a dog", "--concepts", "dog.safetensors", "--base", "toyland-xl", way)


def test_files_that_do_not_tell_their_base_are_one_message_and_none_if_the_base_is_embedded(of_sd3) -> None:
    files = ["rex.safetensors", str(Path("rex.safetensors").rename("ming.safetensors").absolute())]
    Path(files[0]).write_bytes(Path("ming.safetensors").read_bytes())
    words = ("--trigger", "rex=rex", "--trigger", "ming=ming", "--class-word", "rex=dog", "--class-word", "ming=vase")
    with warnings.catch_warnings():
        warnings.simplefilter("error", MixOfShowWarning)
        assert "base model: toyland-sd3," in run("compare", *files, *words, "--dry-run")
    told = run("inspect", "rex.safetensors")
    assert "(--base toyland-sd3)" in " ".join(told.replace("│", " ").split())
    for name in ("dog", "ink"):
        write_lora(Path(f"{name}.safetensors"), {"unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k": SD1})
    given = ("dog.safetensors", "ink.safetensors", "--trigger", "dog=sks", "--trigger", "ink=inkwash")
    with pytest.warns(MixOfShowWarning) as caught:
        run("compare", *given, "--dry-run")
    told = [str(each.message) for each in caught if "base model" in str(each.message)]
    assert len(told) == 1
    assert told[0].startswith("dog.safetensors, ink.safetensors do not tell their base model; stable-diffusion-v1-5/")


def test_a_plain_pack_keeps_words_and_record_in_other_formats_and_the_names_are_told(of_sd3) -> None:
    other = Path("plain")
    other.write_text("")
    for place in ("k", "d"):
        run("convert", "pack", place, "--to", {"k": "kohya", "d": "diffusers"}[place])
    (kohya,) = Path("k").iterdir()
    for file in (kohya, Path("d/pytorch_lora_weights.safetensors")):
        assert file.stat().st_mode == other.stat().st_mode
        told = json.loads(run("inspect", file, "--json"))
        assert told["trigger_words_of_sources"] == {"rex": ["rex dog"]}
        assert told["base_model"] == "toyland-sd3"
    named = CliRunner().invoke(cli.app, ["convert", "pack", "k2", "--to", "kohya"])
    assert "Note: Of Stable Diffusion 3, layers have diffusers' names, under which both ComfyUI" in named.stderr
    asked = json.loads(run("convert", "pack", "k3", "--to", "kohya", "--json"))
    assert len(asked["notes"]) == 1
    assert json.loads(run("convert", "pack", "d2", "--to", "diffusers", "--json"))["notes"] == []
    for program, wanted in (("comfyui", "kohya, which comfyui loads"), ("A1111", "kohya"), ("koya", "'kohya'")):
        refused = CliRunner().invoke(cli.app, ["convert", "pack", "never", "--to", program])
        assert refused.exit_code == 2
        assert wanted in " ".join(refused.stderr.replace("│", " ").split())
    assert not Path("never").exists()


def test_a_table_of_80_columns_holds_the_names_of_packs(monkeypatch, capsys) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    identity = Identity(alignment=0.5, nearest=1.0, attributes=0.5)
    names = ("class word", "bobo.safetensors", "average", "x.safetensors", "x")
    rows = [
        Row(
            concept=concept,
            pack=name,
            text_alignment=1.5,
            identity=identity,
            drift=0.1,
            retention={"alignment": -0.25, "attributes": 0.5},
        )
        for concept in ("bobo", "kiki")
        for name in names
    ]
    _print_table(rows, {})
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    told = [[cell.strip() for cell in line.split("│")[1:3]] for line in lines if line.startswith("│")]
    shown = ["class word", "bobo", "average", "x.safetensors", "x"]
    assert [name for _, name in told] == [*shown, *shown]


def test_a_base_without_any_pipeline_is_one_clear_error(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    site = "transformer.transformer_blocks.0.attn2.to_k"
    assert ANIMA.has_site(site)
    assert not ANIMA.pipeline
    lora = {site: packs.LowRank(down=torch.randn(2, 1024), up=torch.randn(2048, 2), alpha=2.0)}
    path = write_lora(tmp_path / "x.safetensors", lora)
    with pytest.raises(ConfigurationError, match=r"x\.safetensors is for Anima.*no pipeline.*cannot be measured"):
        run("evaluate", path, "--base", "user/anima", "--trigger", "x=sks", *QUICK)


@pytest.mark.parametrize(
    ("prompts", "shared"),
    [
        (["photo of sks dog", "sks dog on the beach"], "sks dog"),
        (["a photo of sks dog", "a drawing of sks dog"], "sks dog"),
        (["a photo of a Sks dog, smiling", "SKS dog"], "Sks dog"),
        (["sks"], "sks"),
        (["a dog", "a cat"], ""),
        (["a photo of"], ""),
        ([], ""),
        (["", "sks dog"], ""),
        ([" ".join(map(str, range(5000)))] * 50, " ".join(map(str, range(100)))),
    ],
)
def test_trigger_words_are_what_the_prompts_of_a_source_share(prompts: list[str], shared: str) -> None:
    assert find_shared_words(prompts) == shared


def test_trigger_words_of_the_files_count_before_what_prompts_share(tmp_path: Path) -> None:
    told = {"modelspec.trigger_phrase": "sks dog"}
    file = write(tmp_path / "dog.safetensors", 1, **told)
    for prompts, words in (([], "sks dog"), (["my sks dog", "a sks dog here"], "sks dog"), (["abc x", "abc"], "abc")):
        with pytest.warns(MixOfShowWarning) if not prompts else torch.no_grad():
            fused = GradientFuser().fuse([LoRASource(file, prompts)], method="average")
        assert trigger_words_of_sources(fused.training) == {"dog": (words,)}
        fused.save_pretrained(tmp_path / "out", overwrite=True)
        assert trigger_words_of_sources(open_edlora(tmp_path / "out").edlora.training) == {"dog": (words,)}
    odd: Any = {
        "fusion": {"prompts": {"x": ["a\x1b[31m"], "y": 3, "<rex>": ["a <rex>"]}, "sources": [3, {"concepts": 1}]}
    }
    assert trigger_words_of_sources(odd) == {"x": ()}
    assert trigger_words_of_sources({}) == {}


def test_an_ed_lora_is_measured_as_before(asked) -> None:
    packs.random_pack(tiny.components(), "rex").save_pretrained("rex")
    told = json.loads(run("evaluate", "rex", *asked, "--json"))
    assert "trigger_words" not in told["settings"]


def test_a_pack_of_plain_loras_names_the_base_that_it_was_fused_for(asked, place) -> None:
    """Methods that load no model know it from ``--base``, others from the pipeline; a pack's own word is kept."""
    base, prompts = str(place / "base"), ("--prompts", "a sks dog", "--prompts", "a house, inkwash")
    for method in ("average", "closed-form"):
        files = ("dog.safetensors", "ink.safetensors")
        run("fuse", *files, *prompts, "--base", base, "--method", method, "--output", method)
        (told,) = [json.loads(run("inspect", method, "--json"))]
        assert told["base_model"] == base
        words = ("--class-word", "dog=dog", "--class-word", "ink=drawing", "--trigger", "ink=ink")
        with warnings.catch_warnings():
            warnings.simplefilter("error", MixOfShowWarning)
            measured = json.loads(run("evaluate", method, *asked[2:], *words, "--dry-run", "--json"))
            sampled = json.loads(run("sample", "--concepts", method, "--prompt", "a dog", "--dry-run", "--json"))
        assert measured["base model"].startswith(f"{base},")
        assert sampled["base model"].startswith(f"{base},")
    assert FusedPack.from_pretrained("both").base_model == ""
    run("fuse", "both", "closed-form", "--prompts", "a dog", "--prompts", "x", "--method", "sum", "--output", "again")
    assert read_plain_pack("again").base_model == base


def test_a_base_that_the_record_names_is_untrusted(tmp_path: Path) -> None:
    for base in (3, "a\x1b[31m", "x" * 1000, None):
        told = {"mixofshow_fusion": json.dumps({"base_model": base})}
        path = write(tmp_path / "x.safetensors", 1, **told)
        assert open_edlora(path).edlora.base_model == ""
        assert json.loads(run("inspect", path, "--json"))["base_model"] == ""


def test_a_fused_pack_is_fused_again_by_the_names_and_prompts_of_its_record(asked) -> None:
    write(Path("cat.safetensors"), 3)
    said = run("fuse", "both", "cat.safetensors", "--prompts", "ohwx cat", "--method", "average", "--output", "three")
    assert "fused from dog, ink (prompts in its record: 2, 1)" in said
    assert "--weight 2 --weight 1 gives each of its 2 the weight of one" in said
    assert "Wrote the fused pack of dog, ink, cat to three" in said
    assert read_plain_pack("three").report.data["prompts"] == {**PROMPTS, "cat": ["ohwx cat"]}
    (told,) = [json.loads(run("inspect", "three", "--json"))]
    assert told["trigger_words_of_sources"].keys() == {"dog", "ink", "cat"}
    card = Path("three", "README.md").read_text()
    assert "# LoRA fused from `dog`, `ink`, `cat`\n\n3 LoRAs in one" in card
    assert "| `dog`, `ink` | a private file |" in card
    digests = {name: open_edlora(f"{name}.safetensors").edlora.digest[:12] for name in ("dog", "ink")}
    assert all(
        f"| in it: `{name}` | a private file | - | - | `{digest}` |" in card for name, digest in digests.items()
    )
    cat = "| in it: `cat` | a private file | - | - | "
    assert cat not in card
    write(Path("bird.safetensors"), 4)
    run("fuse", "three", "bird.safetensors", "--prompts", "ohwx bird", "--method", "average", "--output", "four")
    four = Path("four", "README.md").read_text()
    assert "| `dog`, `ink`, `cat` | a private file |" in four
    assert cat in four
    assert four.count("| in it: ") == 3
    given = ("--prompts", "x", "--prompts", "ohwx cat")  # those of the command line go first
    run("fuse", "both", "cat.safetensors", *given, "--method", "average", "--output", "given")
    assert read_plain_pack("given").report.data["prompts"]["both"] == ["x"]
    Path("list.toml").write_text("[[source]]\npath = 'both'\nname = 'pair'\n")
    run("fuse", "list.toml", "--method", "average", "--output", "listed")
    assert len(read_plain_pack("listed").report.data["prompts"]["pair"]) == 3
    with pytest.raises(ConfigurationError, match=r"0 times for 1 plain LoRAs \(cat.safetensors\)"):
        run("fuse", "both", "cat.safetensors", "--method", "closed-form", "--output", "none")


def test_members_of_a_pack_that_is_fused_again_are_measured_each(asked) -> None:
    write(Path("cat.safetensors"), 3)
    again = ("both/pytorch_lora_weights.safetensors", "cat.safetensors", "--method", "average", "--keep-sources")
    run("fuse", *again, "--prompts", "ohwx cat", "--output", "three")
    words = ("--class-word", "dog=dog", "--class-word", "ink=drawing", "--class-word", "cat=cat")
    rows = json.loads(run("evaluate", "three", *asked, *words, "--json"))["rows"]
    drawn = {(row["concept"], row["pack"]) for row in rows}
    assert {("dog", "three"), ("ink", "three"), ("cat", "three"), ("cat", "sources/cat")} <= drawn


def test_a_pack_without_prompts_keeps_its_names_when_it_is_fused_again(asked) -> None:
    for name, seed in (("cat", 3), ("fox", 4)):
        write(Path(f"{name}.safetensors"), seed)
    with pytest.warns(MixOfShowWarning, match="what calls dog, ink:"):
        run("fuse", "dog.safetensors", "ink.safetensors", "--method", "average", "--output", "silent")
    with pytest.warns(MixOfShowWarning, match="what calls dog, ink, cat:"):
        said = run("fuse", "silent", "cat.safetensors", "--method", "average", "--output", "three")
    assert "fused from dog, ink (prompts in its record: 0, 0)" in said
    with pytest.warns(MixOfShowWarning, match="what calls dog, ink, cat, fox:"):
        run("fuse", "three", "fox.safetensors", "--method", "average", "--output", "four")
    assert read_plain_pack("four").report.data["prompts"] == {"dog": [], "ink": [], "cat": [], "fox": []}
    with pytest.raises(ConfigurationError, match=r"0 times for 2 plain LoRAs \(four, both/\.\./cat"):
        run("fuse", "four", "both/../cat.safetensors", "--output", "none")


def test_members_of_packs_that_share_a_name_are_one_error(asked) -> None:
    with pytest.raises(FusionError, match=r"LoRAs with the same name: dog; give each its own, name='\.\.\.'"):
        run("fuse", "both", "dog.safetensors", "--prompts", "a sks dog", "--method", "average", "--output", "again")


def test_what_the_files_of_members_told_is_known_after_fusing_twice(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("rex", "kit", "cat")):
        write(Path(f"{name}.safetensors"), seed, **{"modelspec.trigger_phrase": f"sks {name}"})
    run("fuse", "rex.safetensors", "kit.safetensors", "--method", "average", "--output", "two")
    run("fuse", "two", "cat.safetensors", "--method", "average", "--output", "three")
    told = json.loads(run("inspect", "three", "--json"))
    assert told["trigger_words_of_sources"] == {name: [f"sks {name}"] for name in ("rex", "kit", "cat")}
    assert set(told["trigger_words_from"].values()) == {"told by its file"}


def test_names_in_a_record_are_untrusted(tmp_path: Path) -> None:
    """A name that no fusion writes is not taken: the pack is called by its file then."""
    for names in (["../x"], ["a b", "dog"], ["x\x1b[31m", "<rex>"]):
        record = {"fusion": {"prompts": {name: ["sks"] for name in names}}}
        path = write(tmp_path / "odd.safetensors", 1, mixofshow_fusion=json.dumps(record))
        fused = GradientFuser().fuse([LoRASource(path)], method="average")
        assert [list(source.prompts) for source in fused.sources] == [["odd"]]


def test_a_file_of_diffusers_usual_name_is_called_by_its_folder(tmp_path: Path) -> None:
    files = [write(tmp_path / name / "pytorch_lora_weights.safetensors", seed) for seed, name in enumerate(("a", "b"))]
    fused = GradientFuser().fuse([LoRASource(file, ["sks"]) for file in files], method="average")
    assert [source.name for source in fused.sources] == ["a", "b"]
    assert LoRASource("pytorch_lora_weights.safetensors", ["sks"]).label == "pytorch_lora_weights"
