"""Model cards: what the Hub reads in them, what people wrote stays, and text from files does nothing but show."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from PIL import Image

import packs
import tiny
from diffusers_mixofshow import toyland
from diffusers_mixofshow.edlora import EDLoRA
from diffusers_mixofshow.edlora.card import refresh_text
from diffusers_mixofshow.errors import ConceptError, ConfigurationError
from diffusers_mixofshow.notes import write_with_note
from diffusers_mixofshow.pipelines import MixOfShowPipeline


FUSION = {
    "method": "closed-form",
    "ridge": 1e-4,
    "max_rank": None,
    "sources": [
        {"concepts": ["<rex>"], "weight": 0.75, "scale": 1.0, "origin": "ann/edlora-rex", "digest": "ab" * 32,
         "revision": "c0ffee" * 6 + "c0ff"},
        {"concepts": ["<tom>"], "weight": 0.25, "scale": 1.0, "origin": "", "digest": "cd" * 32},
    ],
    "residuals": {"mean": {"<rex>": {"average": 0.71, "fused": 0.0312}, "<tom>": {"average": 0.66, "fused": None}}},
}  # fmt: skip


@pytest.fixture(scope="module")
def fused(components):
    return dataclasses.replace(packs.random_pack(components, "rex", "tom"), training={"fusion": FUSION})


def saved_card(pack, folder, **keywords):
    pack.save_pretrained(folder, overwrite=True, **keywords)
    return ModelCard.load(folder / "README.md")


def on_hub(hub, repo_id):
    return hub.repositories[repo_id].branches["main"][-1][2]


# --- what the Hub reads ---


def test_metadata_of_one_concept(pack, tmp_path):
    data = saved_card(pack, tmp_path).data
    assert (data.base_model, data.base_model_relation) == ("someone/tiny", "adapter")
    assert (data.library_name, data.pipeline_tag, data.instance_prompt) == ("diffusers", "text-to-image", "a <rex>")
    assert {"mix-of-show", "edlora", "lora", "diffusers", "text-to-image"} <= set(data.tags)
    assert data.license is None
    assert data.get("widget") is None


@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize("names", [("rex",), ("rex", "tom")])
def test_of_a_base_on_this_disk_the_card_tells_the_name_alone(components, tmp_path, names, there):
    base = tmp_path / "secret" / "mybase"
    if there:
        base.mkdir(parents=True)
    pack = dataclasses.replace(
        packs.random_pack(components, *names),
        base_model=str(base),
        training={"settings": {"pretrained_model_name_or_path": str(base)}},
    )
    card = saved_card(pack, tmp_path / "pack")
    assert "secret" not in card.content
    assert card.content.count("mybase") == 3  # summary, code, settings
    assert card.data.base_model is None
    assert EDLoRA.from_pretrained(tmp_path / "pack").base_model == str(base)


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("given", ["absolute", "relative", "here"])
def test_the_code_of_a_local_card_tells_the_folders_own_name(components, tmp_path, monkeypatch, given, merged):
    folder = tmp_path / "secret" / "mine"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder if given == "here" else tmp_path)
    place = {"absolute": folder, "relative": Path("secret/mine"), "here": Path()}[given]
    pack = packs.random_pack(components, "rex", "tom")
    if merged:
        (folder / "model_index.json").write_text("{}")
        pack.save_beside(place)
    else:
        pack.save_pretrained(place)
    content = (folder / "README.md").read_text()
    assert ("MixOfShowPipeline.from_pretrained('mine')" if merged else "pipe.load_edlora('mine')") in content
    assert "secret" not in content


def test_a_folder_of_the_hubs_cache_is_told_by_its_id(pack, tmp_path):
    cached = tmp_path / "hub" / "models--someone--tiny" / "snapshots" / ("ab" * 20)
    cached.mkdir(parents=True)
    card = saved_card(dataclasses.replace(pack, base_model=str(cached)), tmp_path / "pack")
    assert card.data.base_model == "someone/tiny"
    assert "abab" not in card.content


def test_a_folder_that_is_spelt_like_an_id_is_no_link(pack, tmp_path, monkeypatch):
    (tmp_path / "hidden-place" / "base").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    card = saved_card(dataclasses.replace(pack, base_model="hidden-place/base"), tmp_path / "pack")
    assert card.data.base_model is None
    assert "hidden-place" not in card.content


def test_the_licence_is_the_one_given_or_that_of_a_known_base(pack, tmp_path):
    assert saved_card(pack, tmp_path / "a", license="cc-by-4.0").data.license == "cc-by-4.0"
    known = dataclasses.replace(pack, base_model="stable-diffusion-v1-5/stable-diffusion-v1-5")
    assert saved_card(known, tmp_path / "b").data.license == "creativeml-openrail-m"


def test_samples_become_widget_gallery_and_files_without_their_metadata(pack, loopback_hub, tmp_path):
    photo = Image.new("RGB", (8, 8), "red")
    exif = photo.getexif()
    exif[0x010E] = "taken at home"
    photo.save(tmp_path / "photo.jpg", exif=exif)
    samples = {"a <rex> on the beach": photo, "a <rex>: asleep": str(tmp_path / "photo.jpg")}
    pack.push_to_hub("me/dog", token=loopback_hub.token, samples=samples)
    files = on_hub(loopback_hub, "me/dog")
    card = ModelCard(files["README.md"].decode())
    assert card.data.widget == [
        {"text": "a <rex> on the beach", "output": {"url": "samples/0.png"}},
        {"text": "a <rex>: asleep", "output": {"url": "samples/1.png"}},
    ]
    assert "<Gallery />" in card.text
    assert files["samples/1.png"].startswith(b"\x89PNG")
    assert b"taken at home" not in files["samples/1.png"]


@pytest.mark.parametrize(("name", "kind"), [("x.png", "PNG"), ("x.jpg", "JPEG"), ("x.webp", "WEBP")])
def test_a_sample_is_published_without_the_settings_that_drew_it(pack, tmp_path, name, kind):
    """The card says the prompt that its user gives; the picture's own may say more than is meant for strangers."""
    write_with_note(tmp_path / name, Image.new("RGB", (8, 8)), kind, {"layout": "private"}, "private")
    opened = Image.open(tmp_path / name)
    pack.save_pretrained(tmp_path / "pack", samples={"a": tmp_path / name, "b": opened})
    for number in (0, 1):
        with Image.open(tmp_path / "pack" / "samples" / f"{number}.png") as published:
            assert published.text == {}
            assert not published.getexif()
            assert "exif" not in published.info


def test_a_sample_that_is_no_picture_is_refused(pack, tmp_path):
    (tmp_path / "x.png").write_bytes(b"no picture")
    with pytest.raises(ConfigurationError, match="sample picture"):
        pack.save_pretrained(tmp_path / "pack", samples={"a": tmp_path / "x.png"})


def test_a_fused_pack_names_its_sources_and_what_it_kept(fused, tmp_path):
    text = saved_card(fused, tmp_path).text
    assert "| `<rex>` | dog | pet | `a <rex>` | 0.031 | 0.710 |" in text
    assert "| `<tom>` | dog | pet | `a <tom>` | - | - |" in text
    assert "[ann/edlora-rex](https://huggingface.co/ann/edlora-rex) | `c0ffeec0ffee` | 0.75 | `abababababab` |" in text
    assert "| `<tom>` | a private file | - | 0.25 | `cdcdcdcdcdcd` |" in text
    assert "## Responsible use" in text


def test_below_a_source_that_is_a_pack_stands_what_it_was_fused_from(pack, tmp_path):
    members = [{key: entry[key] for key in entry if key != "weight"} for entry in FUSION["sources"]]
    source = {"concepts": ["<rex>", "<tom>"], "weight": 1.0, "origin": "", "digest": "ef" * 32, "members": members}
    odd = {**source, "members": [3, {"concepts": [[]], "origin": "../../etc", "digest": 7}]}
    record = {**FUSION, "sources": [source, odd, {**source, "members": "none"}]}
    text = saved_card(dataclasses.replace(pack, training={"fusion": record}), tmp_path).text
    rows = text.partition("| concepts | from |")[2].partition("\n\n")[0].splitlines()[2:]
    assert rows == [
        "| `<rex>`, `<tom>` | a private file | - | 1 | `efefefefefef` |",
        "| in it: `<rex>` | [ann/edlora-rex](https://huggingface.co/ann/edlora-rex) | `c0ffeec0ffee` | - "
        "| `abababababab` |",
        "| in it: `<tom>` | a private file | - | - | `cdcdcdcdcdcd` |",
        "| `<rex>`, `<tom>` | a private file | - | 1 | `efefefefefef` |",
        "| in it: `[]` | a private file | - | - | `7` |",
        "| `<rex>`, `<tom>` | a private file | - | 1 | `efefefefefef` |",
    ]


EVALUATION = {
    "metric_model": "a/`clip`",
    "pictures": 12,
    "concepts": {
        "<rex>": {
            "text_alignment": 0.781,
            "identity": {"alignment": 0.8123, "attributes": None, "nearest": 1.0},
            "retention": {"alignment": 0.934, "attributes": None},
        },
        "<tom>": {"text_alignment": 0.702, "identity": None, "retention": None},
    },
}


def test_what_was_measured_stands_beside_the_residuals(fused, tmp_path):
    measured = dataclasses.replace(fused, training={**fused.training, "evaluation": EVALUATION})
    text = saved_card(measured, tmp_path).text
    assert "| retention | image-alignment | text-alignment | features lost, fused | features lost, averaged |" in text
    assert "| `<rex>` | dog | pet | `a <rex>` | 0.93 | 0.81 | 0.78 | 0.031 | 0.710 |" in text
    assert "| `<tom>` | dog | pet | `a <tom>` | - | - | 0.70 | - | - |" in text
    assert "12 pictures of each concept with `a/'clip'`" in text


@pytest.mark.parametrize(
    "record",
    [3, {"concepts": []}, {"concepts": {"<rex>": 3}}, {"concepts": {"<rex>": {"retention": {"alignment": "1"}}}}],
)
def test_an_evaluation_of_another_shape_breaks_no_card(pack, tmp_path, record):
    odd = dataclasses.replace(pack, training={"evaluation": record})
    assert "evaluate" not in str(odd._card("here", False, {}, None))


@pytest.mark.parametrize(
    "record",
    [
        3,
        [],
        {"sources": 3},
        {"sources": [3, {}], "residuals": 4},
        {"residuals": {"mean": []}, "method": ["x"]},
        {"residuals": {"mean": {"<rex>": {"fused": "1", "average": 1e400}}}},
        {"sources": [{"concepts": [[]], "origin": "../../etc", "weight": "9", "digest": 7, "revision": "../"}]},
    ],
)
def test_a_record_of_another_shape_breaks_no_card(pack, tmp_path, record):
    odd = dataclasses.replace(pack, training={"fusion": record})
    assert "etc)" not in str(odd._card("here", False, {}, None))


# --- the code ---


@pytest.fixture(scope="module")
def toyland_pipe():
    pipe = toyland.load_pipeline(pipeline_class=MixOfShowPipeline)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("sent", ["concept", "pack", "pipeline"])
def test_the_code_of_a_card_on_the_hub_runs_when_pasted(loopback_hub, toyland_pipe, tmp_path, monkeypatch, sent):
    names = ("rex",) if sent == "concept" else ("rex", "tom")
    pack = packs.random_pack(toyland_pipe.components, *names, ranks=(1,), base_model="toyland")
    if sent == "pipeline":
        toyland_pipe.load_edlora(pack)
        toyland_pipe.push_to_hub("me/shared", token=loopback_hub.token)
        toyland_pipe.unload_edlora()
    else:
        pack.push_to_hub("me/shared", token=loopback_hub.token)
    code = (
        ModelCard(on_hub(loopback_hub, "me/shared")["README.md"].decode()).text.split("```python\n")[1].split("```")[0]
    )
    assert "'me/shared'" in code
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    with Image.open(tmp_path / "rex.png") as drawn:
        assert drawn.size == (64, 64)


# --- what people wrote stays ---


def test_what_stands_around_our_section_stays_and_ours_is_refreshed(loopback_hub, pack, fused):
    pack.push_to_hub("me/dog", token=loopback_hub.token, license="mit")
    repository = loopback_hub.repositories["me/dog"]
    text = on_hub(loopback_hub, "me/dog")["README.md"].decode()
    edited = text.replace("license: mit", "license: cc-by-4.0\nlanguage: de").replace("- lora\n", "- lora\n- hund\n")
    edited = edited.replace("\n# ED-LoRA of", "\nscribbled inside\n# ED-LoRA of") + "\n## Rex\n\nIch mag *ihn*.\n"
    repository.commit("main", "edit", {"README.md": edited.encode()})
    dataclasses.replace(fused, base_model="other/base").push_to_hub("me/dog", token=loopback_hub.token, license="mit")
    card = ModelCard(on_hub(loopback_hub, "me/dog")["README.md"].decode())
    assert card.text.endswith("\n## Rex\n\nIch mag *ihn*.\n")
    assert "scribbled inside" not in card.text
    assert "# Mix-of-Show: `<rex>`, `<tom>` in one model" in card.text
    assert card.text.count("# Mix-of-Show") == 1
    assert (card.data.license, card.data.language, card.data.base_model) == ("cc-by-4.0", "de", "other/base")
    assert {"hund", "edlora"} <= set(card.data.tags)


def test_samples_stay_until_there_are_new_ones(loopback_hub, pack):
    pack.push_to_hub("me/dog", token=loopback_hub.token, samples={"a <rex>": Image.new("RGB", (4, 4))})
    pack.push_to_hub("me/dog", token=loopback_hub.token, commit_message="again")
    card = ModelCard(on_hub(loopback_hub, "me/dog")["README.md"].decode())
    assert card.data.widget[0]["output"] == {"url": "samples/0.png"}
    assert card.text.count("<Gallery />") == 1


@pytest.mark.parametrize("text", ["my own words\n", "---\nlicense: mit\n---\n# Mine\n", "---\n[broken: yaml\n---\nx"])
def test_a_card_without_our_marks_is_left_alone(loopback_hub, pack, text):
    pack.push_to_hub("me/dog", token=loopback_hub.token)
    loopback_hub.repositories["me/dog"].commit("main", "theirs", {"README.md": text.encode()})
    pack.push_to_hub("me/dog", token=loopback_hub.token)
    assert on_hub(loopback_hub, "me/dog")["README.md"].decode() == text


def test_a_card_that_the_hub_made_of_metadata_alone_gets_ours(loopback_hub, pack):
    pack.push_to_hub("me/dog", token=loopback_hub.token)
    loopback_hub.repositories["me/dog"].commit("main", "theirs", {"README.md": b"---\nlicense: mit\n---\n"})
    pack.push_to_hub("me/dog", token=loopback_hub.token)
    card = ModelCard(on_hub(loopback_hub, "me/dog")["README.md"].decode())
    assert card.data.license == "mit"
    assert "# ED-LoRA of `<rex>`" in card.text


def test_a_link_in_place_of_the_card_is_not_written_through(pack, tmp_path):
    (tmp_path / "private.txt").write_text("")
    (tmp_path / "pack").mkdir()
    (tmp_path / "pack" / "README.md").symlink_to(tmp_path / "private.txt")
    pack.save_pretrained(tmp_path / "pack")
    assert (tmp_path / "private.txt").read_text() == ""
    assert not (tmp_path / "pack" / "README.md").is_symlink()


# --- text from files ---

HOSTILE = [
    "<img src=x onerror=alert(1)>",
    "<script>alert(1)</script>",
    "![x](http://evil.example/p.png)",
    "[click](javascript:alert(1))",
    "http://evil.example www.evil.example",
    "`code` **bold** _it_ ~~gone~~ # head",
    "a | b | c\n\n# heading\n---\n- item",
    "\x1b[2Jcleared\u202eevil\x00",
    "<!-- diffusers-mixofshow: end --> <b>out</b>",
    "]] }} {{ 7*7 }} {% x %} $(id) ${HOME} &lt;b&gt;",
]


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_names_and_records_are_shown_and_do_nothing(fused, tmp_path, text):
    concepts = tuple(dataclasses.replace(concept, class_word=text) for concept in fused.concepts)
    source = {**FUSION["sources"][0], "concepts": [text], "origin": text, "digest": text, "revision": text}
    record = {**FUSION, "method": text, "sources": [{**source, "members": [source]}]}
    hostile = dataclasses.replace(fused, concepts=concepts, base_model=text, training={"fusion": record})
    card = hostile._card(text, False, {"samples/0.png": text}, text)
    again = ModelCard(str(card))
    assert (again.data.license, again.data.widget[0]["text"]) == (text, text)
    html = MarkdownIt("gfm-like", {"linkify": False}).render(again.text)
    plain = MarkdownIt("gfm-like", {"linkify": False}).render(
        str(fused._card("x", False, {"a": "b"}, None)).split("---\n", 2)[2]
    )
    for tag in ("<img", "<script", "<b>", "<a ", "<h1", "<h2", "<tr", "<del", "<strong", "<em", "<li"):
        assert html.count(tag) <= plain.count(tag), tag
    code = card.text.split("```python\n")[1].split("```")[0]
    compile(code, "card", "exec")
    refreshed = refresh_text(str(card) + "mine", fused._card("x", False, {}, None))
    assert refreshed.count("mix-of-show") == 1
    body = refreshed.split("---\n", 2)[2]
    assert body.count("<!-- diffusers-mixofshow: end") == 1, "A text from a file ended the section."
    assert refreshed.endswith("diffusers-mixofshow: end -->\nmine")


# --- a whole pipeline ---


def pipeline(components=None):
    pipe = MixOfShowPipeline(**(components or tiny.components()), requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def picture(pipe):
    return pipe("a <rex> and <tom>", num_inference_steps=2, height=32, width=32, output_type="pt",
                generator=packs.torch.Generator().manual_seed(0)).images  # fmt: skip


def test_a_pushed_pipeline_draws_what_it_drew(loopback_hub, components):
    pipe = pipeline()
    pipe.load_edlora(packs.random_pack(components, "rex"), scale=0.5)
    pipe.load_edlora(packs.random_pack(components, "tom", seed=2, ranks=(2,)))
    before = {name: value.clone() for name, value in pipe.unet.state_dict().items()}
    drawn = picture(pipe)
    url = pipe.push_to_hub(token=loopback_hub.token)
    assert url == f"{loopback_hub.url}/me/mixofshow-rex-tom"
    after = pipe.unet.state_dict()
    assert before.keys() == after.keys()
    assert all(packs.torch.equal(value, after[name]) for name, value in before.items())
    packs.torch.testing.assert_close(picture(pipe), drawn)
    again = MixOfShowPipeline.from_pretrained("me/mixofshow-rex-tom", requires_safety_checker=False)
    again.set_progress_bar_config(disable=True)
    packs.torch.testing.assert_close(picture(again), drawn, rtol=1e-3, atol=1e-3)
    card = ModelCard(on_hub(loopback_hub, "me/mixofshow-rex-tom")["README.md"].decode())
    assert card.data.base_model_relation == "finetune"
    assert "MixOfShowPipeline.from_pretrained('me/mixofshow-rex-tom')" in card.text


def test_a_pipeline_without_concepts_says_what_to_load(loopback_hub, components):
    with pytest.raises(ConceptError, match="load_edlora"):
        pipeline(components).push_to_hub("me/x", token=loopback_hub.token)
    assert loopback_hub.repositories == {}


def test_options_of_the_hub_pass_through_a_pipeline(loopback_hub, pack, tmp_path):
    pack.push_to_hub("me/dog", token=loopback_hub.token, private=True, revision="v1")
    pipe = pipeline()
    options = {"revision": "v1", "token": loopback_hub.token, "cache_dir": tmp_path / "mine"}
    pipe.load_edlora("me/dog", **options)
    pipe.unload_edlora()
    loopback_hub.requests.clear()
    pipe.load_edlora("me/dog", local_files_only=True, **options)
    assert list(pipe.concepts) == ["<rex>"]
    assert loopback_hub.requests == []
    assert isinstance(EDLoRA.from_pretrained("me/dog", **options), EDLoRA)
