"""What the demo samples and how it is counted, on pipelines and judges that note what they are given."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from html.parser import HTMLParser
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
from PIL import Image

from diffusers_mixofshow.demo import sampling
from diffusers_mixofshow.demo.intervals import FUSED_MINUS_AVERAGE, Intervals
from diffusers_mixofshow.demo.measuring import Measures, measure_all
from diffusers_mixofshow.demo.page import write_page
from diffusers_mixofshow.demo.photos import prepare_photos
from diffusers_mixofshow.demo.sampling import METHODS, Pictures, picture_count, sample_all
from diffusers_mixofshow.demo.settings import DemoConcept, DemoSettings
from diffusers_mixofshow.demo.tuning import tuning_config
from diffusers_mixofshow.errors import ConfigurationError
from diffusers_mixofshow.evaluation.identity import NOBODY, Identity
from diffusers_mixofshow.evaluation.intervals import Interval
from diffusers_mixofshow.evaluation.prompts import HELD_OUT_PROMPTS
from diffusers_mixofshow.regions import Draft, Isolation, Refinement
from diffusers_mixofshow.training import TrainingConfig


CLASSES = {"bobo": "critter", "kiki": "critter", "rex": "dog", "ming": "vase"}
CONCEPTS = [DemoConcept(name=name, kind="pet", class_word=word, folder=Path(name)) for name, word in CLASSES.items()]


class Pipe:
    """Notes its calls with the pack that was loaded then."""

    components: Mapping[str, object] = MappingProxyType({})  # without any, it is taken for a Stable Diffusion

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []
        self.loaded: Any = None
        self._progress_bar_config: dict[str, Any] = {}

    def set_progress_bar_config(self, **config: Any) -> None:
        self._progress_bar_config = config

    def load_edlora(self, pack: Path) -> None:
        assert self.loaded is None
        self.loaded = pack

    def unload_edlora(self) -> None:
        self.loaded = None

    def __call__(self, **asked: Any) -> Any:
        seeds = [generator.initial_seed() for generator in asked.pop("generator")]
        self.calls.append(asked | {"seeds": seeds, "pack": self.loaded})
        return type("Output", (), {"images": [Image.new("RGB", (96, 64)) for _ in seeds]})


@pytest.mark.parametrize("seed", [0, 2])
def test_every_method_gets_the_same_prompts_and_seeds_and_its_own_pack(monkeypatch, seed: int) -> None:
    monkeypatch.setattr(sampling.MixOfShowAdapterPipeline, "from_pipe", lambda pipe, adapter: pipe)
    pipe, told = Pipe(), []
    settings = DemoSettings(pictures=2, together=4, steps=3, guidance_scale=2.5, seed=seed)
    packs = {f"single/{name}": Path("single") / name for name in CLASSES}
    packs |= {"average": Path("average"), "fused": Path("fused")}
    pictures = sample_all(pipe, CONCEPTS, packs, settings, told.append)
    assert sum(told) == picture_count(settings) == 4 * 4 * 2 + 2 * 4
    assert pipe.loaded is None
    alone, together = pipe.calls[:16], pipe.calls[16:]
    expected = {
        "class word": [(None, word) for word in CLASSES.values()],
        "single": [(Path("single") / name, f"<{name}>") for name in CLASSES],
        "average": [(Path("average"), f"<{name}>") for name in CLASSES],
        "fused": [(Path("fused"), f"<{name}>") for name in CLASSES],
    }
    assert list(expected) == list(METHODS) == list(pictures.alone)
    for call, (pack, subject) in zip(alone, [each for rows in expected.values() for each in rows], strict=True):
        assert call["pack"] == pack
        assert call["prompt"] == [text.replace("<TOK>", subject) for text in HELD_OUT_PROMPTS[:2]]
        assert call["seeds"] == [1000 * (seed + 1), 1000 * (seed + 1) + 1]
        assert (call["num_inference_steps"], call["guidance_scale"], call["regions"]) == (3, 2.5, None)
    order = [("bobo", "kiki", "rex"), ("kiki", "rex", "bobo"), ("rex", "bobo", "kiki"), ("bobo", "kiki", "rex")]
    places = ["in a meadow", "on the beach", "in the desert", "in the snow"]
    assert pictures.order == order
    for number, call in enumerate(together):
        names, place = order[number % 4], places[number % 4]
        first, second, third = (f"a <{name}> {CLASSES[name]}" for name in names)
        assert call["prompt"] == [f"{first}, {second} and {third} {place}"]
        assert call["seeds"] == [5000 + 1000 * seed + number % 4]
        assert (call["pack"], call["width"], call["height"]) == (Path("fused"), 96, 64)
        assert (call["num_inference_steps"], call["guidance_scale"]) == (3, 2.5)
        assert (call["image"], call["adapter_conditioning_scale"]) == (pictures.layouts[number % 4], 0.8)
        regional = number < 4
        columns = [(index / 3, 0.25, (index + 1) / 3, 0.97) for index in range(3)]
        pairs = [(f"a <{name}>, {place}", box) for name, box in zip(names, columns, strict=True)]
        assert [(region.prompt, region.box) for region in call["regions"] or []] == pairs * regional
        found = [call.get(name) for name in ("isolation", "draft", "refine")]
        assert found == ([Isolation(), Draft(), Refinement()] if regional else [None] * 3)
    assert len({layout.tobytes() for layout in pictures.layouts}) == 3
    assert {layout.size for layout in pictures.layouts} == {(96, 64)}


def test_the_seed_and_what_replaces_the_usual_settings_reach_the_tuning(tmp_path: Path) -> None:
    settings = DemoSettings(folder=tmp_path, seed=4, tuning={"rank": 2})
    config = tuning_config(CONCEPTS[2], settings)
    usual = TrainingConfig.toyland(
        instance_data_dir="rex", concept="rex", class_word="dog", kind="pet",
        output_dir=str(tmp_path / "concepts" / "rex"), seed=4, rank=2, num_validation_images=0,
    )  # fmt: skip
    assert config == usual
    assert tuning_config(CONCEPTS[2], dataclasses.replace(settings, tuning={"seed": 9})).seed == 9


@pytest.mark.parametrize(("seed", "count"), [(0, 3), (5, 2)])
def test_photos_are_drawn_by_the_seed_and_as_many_as_asked(tmp_path: Path, seed: int, count: int) -> None:
    settings = DemoSettings(folder=tmp_path, seed=seed, photo_count=count, concepts=("rex", "bobo"))
    rex, bobo = prepare_photos(settings)
    assert (rex.name, rex.kind, rex.class_word, rex.folder) == ("rex", "pet", "dog", tmp_path / "photos" / "rex")
    assert rex.attributes["collar_colour"] == "red"
    assert (bobo.kind, bobo.placeholder) == ("character", "<bobo>")
    drawn = {path.name: path.read_bytes() for path in sorted(rex.folder.glob("*.png"))}
    assert len(drawn) == count
    other = prepare_photos(dataclasses.replace(settings, folder=tmp_path / "other", seed=seed + 1))[0]
    assert drawn != {path.name: path.read_bytes() for path in sorted(other.folder.glob("*.png"))}


@pytest.mark.parametrize("name", ["photo_count", "pictures", "together", "steps"])
def test_numbers_of_the_demo_are_at_least_one(name: str) -> None:
    DemoSettings(**{name: 1})
    with pytest.raises(ConfigurationError, match=f"{name} is 0, expected at least 1"):
        DemoSettings(**{name: 0})


def test_the_demos_usual_settings() -> None:
    usual = DemoSettings()
    assert (usual.folder, usual.seed, usual.concepts) == (Path("mixofshow-demo"), 0, ("bobo", "kiki", "rex", "ming"))
    assert (usual.photo_count, usual.pictures, usual.together) == (12, 12, 12)
    assert (usual.steps, usual.guidance_scale, usual.overwrite) == (20, 3.0, False)
    DemoSettings(concepts=("bobo", "kiki"))


class Judge:
    """Looks at the middle pixel, and reads one attribute: whether that is red."""

    def features(self, images: Sequence[Image.Image]) -> torch.Tensor:
        pixels = [image.convert("RGB").getpixel((image.width // 2, image.height // 2)) for image in images]
        return torch.tensor(pixels).float() + 1

    def read(self, images: Sequence[Image.Image]) -> list[dict[str, str]]:
        return [{"red": "yes" if row[0] > row[2] else "no", "class": "dog"} for row in self.features(images)]


def painted(*colours: str) -> list[Image.Image]:
    return [Image.new("RGB", (64, 64), colour) for colour in colours]


def halves(left: str, right: str) -> Image.Image:
    picture = Image.new("RGB", (128, 64), left)
    picture.paste(right, (64, 0, 128, 64))
    return picture


def painted_concepts(folder: Path, attributes: bool = True) -> list[DemoConcept]:
    concepts = []
    for name, colour, red in (("ruby", "red", "yes"), ("azure", "blue", "no")):
        (folder / name).mkdir()
        painted(colour)[0].save(folder / name / "x.png")
        told = {"red": red} if attributes else {}
        concepts.append(DemoConcept(name=name, kind="pet", class_word="dog", folder=folder / name, attributes=told))
    return concepts


PAINTED = Pictures(
    alone={
        "class word": {"ruby": painted("blue", "blue"), "azure": painted("red", "red")},
        "single": {"ruby": painted("red", "red"), "azure": painted("blue", "blue")},
        "average": {"ruby": painted("red", "blue"), "azure": painted("red", "red")},
        "fused": {"ruby": painted("red", "red"), "azure": painted("blue", "red")},
    },
    regional=[halves("red", "blue"), halves("red", "blue")],
    unguided=[halves("red", "red"), halves("red", "red")],
    order=[("ruby", "azure"), ("azure", "ruby")],
    layouts=painted("black"),
)


@pytest.mark.parametrize("attributes", [True, False])
def test_shares_of_painted_pictures_are_those_that_one_counts(tmp_path: Path, attributes: bool) -> None:
    measures = measure_all(painted_concepts(tmp_path, attributes), PAINTED, Judge())
    shares = {"photos": 1.0, "class word": 0.0, "single": 1.0, "average": 0.25, "fused": 0.75}
    for method, share in shares.items():
        mean = measures.mean[method]
        assert (mean.attributes, mean.nearest) == (share if attributes else None, share)
    assert measures.identity["average"]["ruby"].nearest == 0.5
    assert measures.identity["average"]["azure"].nearest == 0.0
    assert measures.mean["photos"].alignment == pytest.approx(1)
    kept = {name: each["attributes"] for name, each in measures.retention.items()}
    assert kept == ({"average": 0.25, "fused": 0.75} if attributes else {"average": None, "fused": None})
    likeness = {name: each["alignment"] for name, each in measures.retention.items()}
    assert likeness == {"average": pytest.approx(0.25, abs=1e-3), "fused": pytest.approx(0.75, abs=1e-3)}
    assert measures.found["regional"] == [["ruby", "azure"]] * 2
    assert measures.regions["regional"] == {
        "regions": 0.5, "whole_pictures": 0.5, "looks": 0.5 if attributes else None,
    }  # fmt: skip
    assert measures.regions["unguided"] == {
        "regions": 0.5, "whole_pictures": 0.0, "looks": 0.5 if attributes else None,
    }  # fmt: skip
    sure = measures.intervals
    for method, mean in measures.mean.items():
        for measure, value in dataclasses.asdict(mean).items():
            spread = sure.mean[method][measure]
            assert value is None if spread is None else spread["mean"] == pytest.approx(value, abs=1e-4)
    # One concept keeps a half and the other nothing: both may be drawn twice.
    assert sure.retention["average"]["attributes"] == (
        {"mean": 0.25, "low": 0.0, "high": 0.75, "count": 4} if attributes else None
    )
    for method, shares_kept in measures.retention.items():
        for measure, value in shares_kept.items():
            spread = sure.retention[method][measure]
            assert value is None if spread is None else spread["mean"] == pytest.approx(value, abs=1e-3)
    more = sure.retention[FUSED_MINUS_AVERAGE]["attributes"]
    assert more == ({"mean": 0.5, "low": 0.0, "high": 1.0, "count": 4} if attributes else None)
    assert sure.regions["regional"]["regions"] == {"mean": 0.5, "low": 0.0, "high": 1.0, "count": 2}
    assert sure.regions["unguided"]["regions"] == {"mean": 0.5, "low": 0.5, "high": 0.5, "count": 2}
    looks = {"mean": 0.5, "low": 0.0, "high": 1.0, "count": 2} if attributes else None
    assert sure.regions["regional"]["looks"] == looks
    record = measures.as_record()
    assert record["intervals"] == {
        "mean_identity": sure.mean,
        "identity_retention": sure.retention,
        "right_concept_in_region": sure.regions,
    }
    assert record["identity"]["average"]["ruby"]["nearest"] == 0.5
    assert record["mean_identity"]["fused"] == measures.mean["fused"].as_record()
    assert record["identity_retention"] == measures.retention
    assert record["right_concept_in_region"] == measures.regions
    assert record["concepts_found_in_regions"] == measures.found


class Reader(HTMLParser):
    """The texts of a page by what they stand in, and its pictures' number."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.cells: list[list[str]] = []
        self.tiles: list[str] = []
        self.marks: list[tuple[str, str]] = []
        self.titles: list[str] = []
        self.captions: list[tuple[str, str]] = []  # title of the section, and what a column of it says
        self.pictures: list[str] = []
        self._inside: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "img":
            self.pictures.append(dict(attrs)["src"] or "")
        elif tag not in ("meta", "br"):
            self._inside.append(f"{tag} {dict(attrs).get('class') or ''}".strip())
        if tag == "tr":
            self.cells.append([])
        elif tag in ("td", "th"):
            self.cells[-1].append("")
        elif tag == "div" and dict(attrs).get("class") == "tile":
            self.tiles.append("")
        elif tag == "div" and dict(attrs).get("class") == "caption":
            self.captions.append((self.titles[-1], ""))
        elif tag == "h3":
            self.titles.append("")

    def handle_endtag(self, tag: str) -> None:
        self._inside.pop()

    def handle_data(self, text: str) -> None:
        text = text.replace("\xa0", " ")
        if self._inside and self._inside[-1] in ("span right", "span wrong"):
            self.marks.append((self._inside[-1][5:], text.strip()))
        if "h3" in self._inside:
            self.titles[-1] += text
        elif "div caption" in self._inside:
            title, before = self.captions[-1]
            self.captions[-1] = (title, f"{before}{text} ")
        elif "div tile" in self._inside:
            self.tiles[-1] += f"{text} "
        elif any(each.startswith(("td", "th")) for each in self._inside):
            self.cells[-1][-1] += f"{text} "


def spread(methods: Sequence[str], count: Iterator[int]) -> Intervals:
    """Intervals of which no two numbers are alike."""

    def interval() -> Interval:
        mean, low, high = (next(count) / 1000 for _ in range(3))
        return {"mean": mean, "low": low, "high": high, "count": 2}

    def of(*measures: str) -> dict[str, Interval | None]:
        return {measure: interval() for measure in measures}

    return Intervals(
        mean={method: of("alignment", "attributes", "nearest") for method in methods},
        retention={name: of("alignment", "attributes") for name in ("average", "fused", FUSED_MINUS_AVERAGE)},
        regions={name: of("regions", "whole_pictures", "looks") for name in ("regional", "unguided")},
    )


def test_the_page_tells_every_number_where_it_belongs(tmp_path: Path) -> None:
    """No two numbers are alike."""
    count = iter(range(10, 99))

    def identity() -> Identity:
        return Identity(alignment=next(count) / 100, attributes=next(count) / 100, nearest=next(count) / 100)

    methods, names = ("photos", *METHODS), ("ruby", "azure")
    each = {method: {name: identity() for name in names} for method in methods}
    measures = Measures(
        intervals=spread(methods, iter(range(100, 999))),
        identity=each,
        mean={method: identity() for method in methods},
        retention={name: {"alignment": next(count) / 100, "attributes": next(count) / 100}
                   for name in ("average", "fused")},
        found={"regional": [["ruby", NOBODY]] * 9, "unguided": [["azure", "azure"]] * 9},
        regions={name: {key: next(count) / 100 for key in ("regions", "whole_pictures", "looks")}
                 for name in ("regional", "unguided")},
    )  # fmt: skip
    pictures = Pictures(
        alone={method: {name: painted("red") * 6 for name in names} for method in METHODS},
        regional=painted("red") * 9, unguided=painted("blue") * 9, order=[names] * 9, layouts=painted("black"),
    )  # fmt: skip
    report = {"command": "demo", "settings": {"seed": 3}, "seconds": {"tuning": 12.4, "fusion": 2.6},
              "versions": {"torch": "2.13"}, "machine": "Linux"}  # fmt: skip
    photos = {name: painted("white") * 2 for name in names}
    concepts = painted_concepts(tmp_path)
    text = write_page(tmp_path / "x.html", concepts, photos, pictures, measures, report).read_text("utf-8")
    page = Reader(text)

    def told(value: float | None) -> str:
        return "\N{EN DASH}" if value is None else f"{round(100 * value)} %"

    def between(interval: Interval | None) -> str:
        return "" if interval is None else f"{100 * interval['low']:.0f} to {100 * interval['high']:.0f} %"

    def beside(value: float | None, interval: Interval | None) -> str:
        return told(value) + (f" ({between(interval)})" if interval else "")

    kept, regions, sure = measures.retention, measures.regions, measures.intervals
    shares = [regions["regional"]["regions"], regions["unguided"]["regions"],
              kept["fused"]["attributes"], kept["average"]["attributes"]]  # fmt: skip
    assert [tile.split(" %")[0] for tile in page.tiles] == [str(round(100 * share)) for share in shares]
    ranges = [sure.regions["regional"]["regions"], sure.regions["unguided"]["regions"],
              sure.retention["fused"]["attributes"], sure.retention["average"]["attributes"]]  # fmt: skip
    assert [tile.split("(")[1].strip() for tile in page.tiles] == [f"{between(each)})" for each in ranges]
    rows = {row[0].split()[0]: [" ".join(cell.split()) for cell in row[1:]] for row in page.cells if row[0].strip()}
    for name in names:
        captions = [
            f"looks read right {told(one.attributes)} like the photos {one.alignment:.3f} "
            f"nearest photos its own {told(one.nearest)}"
            for one in (each[method][name] for method in methods)
        ]
        said = [" ".join(text.split()) for title, text in page.captions if title.startswith(f"<{name}>, a ")]
        assert said == captions
    for method, one in measures.mean.items():
        mine = kept.get(method, {"attributes": None, "alignment": None})
        own, left = sure.mean[method], sure.retention.get(method, {})
        low, high = (own["alignment"][end] for end in ("low", "high"))
        assert rows[method.split()[0]] == [
            beside(one.attributes, own["attributes"]), beside(mine["attributes"], left.get("attributes")),
            f"{one.alignment:.3f} ({low:.3f} to {high:.3f})", beside(mine["alignment"], left.get("alignment")),
            beside(one.nearest, own["nearest"]),
        ]  # fmt: skip
    for title, shares in zip(page.titles[:2], regions.values(), strict=True):
        assert title.endswith(
            f"right concept in {told(shares['regions'])} of the places, in all places of "
            f"{told(shares['whole_pictures'])} of the pictures; {told(shares['looks'])} of the looks read right in "
            "their places"
        )
    for shares in sure.regions.values():
        places, whole, looks = (between(shares[name]) for name in ("regions", "whole_pictures", "looks"))
        said = f"Likely ranges: {places} of the places, {whole} of the pictures, {looks} of the looks."
        assert said in " ".join(text.replace("&nbsp;", " ").split())
    assert page.titles[1].startswith("The same layout")
    assert page.marks[:2] == [("right", "ruby ✓"), ("wrong", "none of them ✗ (asked: azure)")]
    assert page.marks[-2:] == [("wrong", "azure ✗ (asked: ruby)"), ("right", "azure ✓")]
    assert len(page.marks) == 2 * 2 * 8
    assert [title.split(",")[0] for title in page.titles[2:]] == [f"<{name}>" for name in names]
    on_top = len(names) + 1
    assert len(page.pictures) == on_top + 2 * (2 + 4 * len(METHODS)) + 1 + 2 * 8
    assert "tr class='best'><th>fused</th>" in text
    assert text.count("class='best'") == 1
    assert "<code>demo</code>, seed 3, on Linux: torch 2.13.</p><p>tuning 12 s, fusion 3 s." in text
