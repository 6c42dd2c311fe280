"""The real huggingface_hub client against a Hub on loopback: push, fetch, and what goes wrong on the way."""

from __future__ import annotations

import logging
import traceback

import pytest
import torch
from diffusers import StableDiffusionPipeline
from huggingface_hub import ModelCard

import packs
import tiny
from diffusers_mixofshow.concepts import Concept
from diffusers_mixofshow.edlora import EDLoRA
from diffusers_mixofshow.edlora.hub import is_repo_id, repo_name
from diffusers_mixofshow.errors import EDLoRAFormatError, EDLoRANotFoundError, HubError
from diffusers_mixofshow.interop import convert
from diffusers_mixofshow.interop.opening import read_any
from diffusers_mixofshow.pipelines import MixOfShowPipeline
from diffusers_mixofshow.sampling.loading import load_base
from hub.loopback import Repository


def test_pushed_pack_comes_back_equal(loopback_hub, pack):
    url = pack.push_to_hub(token=loopback_hub.token)
    assert url == f"{loopback_hub.url}/me/edlora-rex"
    packs.assert_same_pack(EDLoRA.from_pretrained("me/edlora-rex"), pack)


def test_everything_goes_in_one_commit_with_a_card_that_names_the_repository(loopback_hub, pack):
    pack.push_to_hub(token=loopback_hub.token, commit_message="first")
    history = loopback_hub.repositories["me/edlora-rex"].branches["main"]
    assert [message for _, message, _ in history] == ["initial commit", "first"]
    files = history[-1][2]
    assert set(files) == {".gitattributes", "README.md", "edlora.safetensors"}
    card = ModelCard(files["README.md"].decode())
    assert card.data.base_model == "someone/tiny"
    assert "pipe.load_edlora('me/edlora-rex')" in card.text


def test_a_fused_pack_is_named_after_its_concepts(loopback_hub, components):
    fused = packs.random_pack(components, "rex", "tom")
    assert fused.push_to_hub(token=loopback_hub.token).endswith("/me/mixofshow-rex-tom")
    packs.assert_same_pack(EDLoRA.from_pretrained("me/mixofshow-rex-tom"), fused)


def test_pushing_again_replaces_and_old_commits_stay_readable(loopback_hub, components, pack):
    pack.push_to_hub("me/dog", token=loopback_hub.token)
    first = loopback_hub.repositories["me/dog"].branches["main"][-1][0]
    newer = packs.random_pack(components, seed=5)
    newer.push_to_hub("me/dog", token=loopback_hub.token)
    packs.assert_same_pack(EDLoRA.from_pretrained("me/dog"), newer)
    packs.assert_same_pack(EDLoRA.from_pretrained("me/dog", revision=first), pack)


def test_a_revision_is_a_branch_that_is_made_where_missing(loopback_hub, components, pack):
    pack.push_to_hub("me/dog", token=loopback_hub.token)
    newer = packs.random_pack(components, seed=5)
    for _ in range(2):
        newer.push_to_hub("me/dog", token=loopback_hub.token, revision="try/2")
    packs.assert_same_pack(EDLoRA.from_pretrained("me/dog", revision="try/2"), newer)
    packs.assert_same_pack(EDLoRA.from_pretrained("me/dog"), pack)


def test_private_repositories_need_the_token(loopback_hub, pack):
    pack.push_to_hub("me/dog", token=loopback_hub.token, private=True)
    assert loopback_hub.repositories["me/dog"].private
    packs.assert_same_pack(EDLoRA.from_pretrained("me/dog", token=loopback_hub.token), pack)


def test_private_repositories_look_missing_without_the_token(loopback_hub, pack):
    pack.push_to_hub("me/dog", token=loopback_hub.token, private=True)
    with pytest.raises(EDLoRANotFoundError, match="or it is private"):
        EDLoRA.from_pretrained("me/dog")


def test_from_the_cache_without_asking_the_hub(loopback_hub, pack, tmp_path):
    pack.push_to_hub("me/dog", token=loopback_hub.token)
    with pytest.raises(EDLoRANotFoundError, match="local_files_only"):
        EDLoRA.from_pretrained("me/dog", local_files_only=True, cache_dir=tmp_path / "mine")
    EDLoRA.from_pretrained("me/dog", cache_dir=tmp_path / "mine")
    loopback_hub.requests.clear()
    read = EDLoRA.from_pretrained("me/dog", local_files_only=True, cache_dir=str(tmp_path / "mine"))
    packs.assert_same_pack(read, pack)
    assert loopback_hub.requests == []


def test_a_subfolder_of_a_repository(loopback_hub, pack):
    pack.push_to_hub("me/dog", token=loopback_hub.token)
    repository = loopback_hub.repositories["me/dog"]
    content = repository.branches["main"][-1][2]["edlora.safetensors"]
    repository.commit("main", "two", {"versions/old/edlora.safetensors": content, "edlora.safetensors": b"broken"})
    packs.assert_same_pack(EDLoRA.from_pretrained("me/dog", subfolder="versions/old"), pack)
    with pytest.raises(EDLoRAFormatError, match="cannot be read as safetensors"):
        EDLoRA.from_pretrained("me/dog")


def test_what_lies_on_disk_comes_first(loopback_hub, pack, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pack.save_pretrained("me/dog")
    packs.assert_same_pack(EDLoRA.from_pretrained("me/dog"), pack)
    assert loopback_hub.requests == []


def test_stock_pipeline_loads_a_pushed_pack(loopback_hub, pack):
    pack.push_to_hub("me/dog", token=loopback_hub.token)
    pipe = StableDiffusionPipeline(**tiny.components(), requires_safety_checker=False)
    pipe.load_lora_weights("me/dog")
    assert pipe.get_list_adapters() == {"unet": ["default_0"], "text_encoder": ["default_0"]}


# --- what goes wrong ---


@pytest.mark.parametrize(
    ("source", "keywords", "error", "message"),
    [
        ("me/nothing", {}, EDLoRANotFoundError, "no repository 'me/nothing'"),
        ("me/dog", {"revision": "v9"}, EDLoRANotFoundError, "no revision 'v9'"),
        ("me/dog", {"subfolder": "x"}, EDLoRANotFoundError, "Give the subfolder"),
        ("me/plain", {}, EDLoRANotFoundError, "holds no ED-LoRA"),
        ("me/a..b", {}, HubError, "no valid Hub id"),
    ],
)
@pytest.mark.parametrize("logged_in", [False, True])
def test_what_is_missing_is_said(loopback_hub, pack, source, keywords, error, message, logged_in):
    pack.push_to_hub("me/dog", token=loopback_hub.token)
    loopback_hub.repositories["me/plain"] = type(loopback_hub.repositories["me/dog"])()
    loopback_hub.repositories["me/plain"].commit("main", "plain", {"README.md": b"x"})
    token = {"token": loopback_hub.token} if logged_in else {}
    with pytest.raises(error, match=message):
        EDLoRA.from_pretrained(source, **keywords, **token)


@pytest.mark.parametrize("token", [None, "hf_wrongwrongwrong", "hf_with_newline\n"])
def test_pushing_without_rights_is_explained(loopback_hub, pack, token):
    with pytest.raises(HubError, match=r"hf auth login|could not serve"):
        pack.push_to_hub("me/dog", token=token)


def test_pushing_into_anothers_namespace_is_explained(loopback_hub, pack):
    with pytest.raises(HubError, match=r"refused access to 'you/dog' \(HTTP 403\)"):
        pack.push_to_hub("you/dog", token=loopback_hub.token)


def test_a_defective_pack_creates_no_repository(loopback_hub, pack):
    broken = type(pack)(**{**vars(pack), "embeddings": {}})
    with pytest.raises(EDLoRAFormatError, match="missing embeddings"):
        broken.push_to_hub("me/dog", token=loopback_hub.token)
    assert loopback_hub.repositories == {}


def test_a_hub_that_is_gone_is_told_without_half_a_minute_of_retries(loopback_hub, pack, monkeypatch, caplog):
    waits = []
    monkeypatch.setattr("time.sleep", waits.append)
    gone = "http://127.0.0.1:9"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", gone)
    monkeypatch.setattr(
        "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", gone + "/{repo_id}/resolve/{revision}/{filename}"
    )
    with pytest.raises(HubError, match="cannot be reached at"):
        pack.push_to_hub("me/dog", token="hf_x")
    with pytest.raises(HubError, match="'me/dog' is neither on this disk nor in the cache"):
        EDLoRA.from_pretrained("me/dog")
    with pytest.raises(HubError, match=r"'me/base' cannot be loaded.*neither on this disk nor in the cache"):
        load_base("me/base")
    assert sum(waits) < 5
    assert "Retrying" not in caplog.text


def test_a_base_in_the_cache_is_loaded_where_the_hub_is_gone(loopback_hub, pack, components, monkeypatch):
    pipe = MixOfShowPipeline(**components, requires_safety_checker=False)
    pipe.load_edlora(pack)
    pipe.push_to_hub("me/base", token=loopback_hub.token)
    pipe.unload_edlora()
    assert list(load_base("me/base").concepts) == ["<rex>"]
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    loopback_hub.requests.clear()
    assert list(load_base("me/base").concepts) == ["<rex>"]
    assert loopback_hub.requests == []


@pytest.mark.parametrize("token", ["hf_wrongwrongwrong", "hf_with_newline\n", "hf_ünicode"])
def test_the_token_shows_in_no_message(loopback_hub, pack, token, capfd, caplog):
    caplog.set_level(logging.DEBUG, logger="diffusers_mixofshow")
    shown = []
    for action in (
        lambda: pack.push_to_hub("me/dog", token=token),
        lambda: EDLoRA.from_pretrained("me/nothing", token=token),
    ):
        with pytest.raises((HubError, EDLoRANotFoundError)) as caught:
            action()
        shown.append("".join(traceback.format_exception(caught.value)))
    shown += [*capfd.readouterr(), caplog.text]
    assert not any(token.strip() in text for text in shown)


# --- names ---


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["potter"], "edlora-potter"),
        (["potter", "hermione"], "mixofshow-potter-hermione"),
        (["a--b..c-"], "edlora-a-b.c"),
        ([f"concept{i}" for i in range(20)], "mixofshow-20-concepts-concept0"),
        (["x" * 200], None),
    ],
)
def test_derived_names_are_valid_on_the_hub(names, expected):
    from huggingface_hub.utils import validate_repo_id

    name = repo_name([Concept.from_name(name, "dog") for name in names])
    validate_repo_id(name)
    assert expected in (name, None)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("user/repo", True),
        ("user-1/edlora_x.v2", True),
        ("repo", False),
        ("./user/repo", False),
        ("/user/repo", False),
        ("user/repo/more", False),
        ("user/file.safetensors", False),
        ("../repo", False),
    ],
)
def test_hub_ids_are_told_from_paths(source, expected):
    assert is_repo_id(source) is expected


def test_tensors_arrive_in_their_dtype(loopback_hub, components):
    half = packs.random_pack(components, dtype=torch.float16)
    half.push_to_hub("me/half", token=loopback_hub.token)
    packs.assert_same_pack(EDLoRA.from_pretrained("me/half"), half)


def test_embeddings_beside_a_plain_lora_are_fetched_with_it(loopback_hub, pack, tmp_path):
    files = convert(pack, tmp_path / "out", "diffusers").files
    content = {file.relative_to(tmp_path / "out").as_posix(): file.read_bytes() for file in files}
    loopback_hub.repositories["me/plain"] = Repository()
    loopback_hub.repositories["me/plain"].commit("main", "first", content)
    found = read_any("me/plain")
    assert list(found.vectors) == ["<rex>"]
    assert found.missing == ""
    assert {file.name for file in found.files} == {file.name for file in files if file.suffix == ".safetensors"}
