"""What goes wrong between us and the Hub: nothing half-sent, nothing half-loaded, and the next try succeeds."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

import packs
import tiny
from diffusers_mixofshow.edlora import EDLoRA
from diffusers_mixofshow.errors import ConfigurationError, EDLoRANotFoundError, HubError
from hub.loopback import Fault


LFS = r"^PUT /storage/"
COMMIT = r"^POST /api/models/.*/commit/"
DOWNLOAD = r"^GET /storage/"


@pytest.fixture(autouse=True)
def waits(monkeypatch):
    """Nobody waits between tries; the seconds that somebody would have waited."""
    seconds = []
    monkeypatch.setattr("time.sleep", seconds.append)
    return seconds


def history(hub, repo_id="me/dog"):
    return [message for _, message, _ in hub.repositories[repo_id].branches["main"]]


def push(hub, pack, **keywords):
    return pack.push_to_hub("me/dog", token=hub.token, commit_message="mine", **keywords)


def partial_files(folder):
    return [path for path in Path(folder).rglob("*") if path.is_file() and path.name == "edlora.safetensors"]


# --- sending ---


@pytest.mark.parametrize(
    "fault",
    [
        Fault(LFS, after=700, of_request=True),
        Fault(LFS, after=700, of_request=True, times=2),
        Fault(LFS, done=True),
        Fault(LFS, done=True, reset=False),
        Fault(LFS, status=503),
        Fault(r"info/lfs/objects/batch", status=502),
        Fault(r"/preupload/", status=500),
        Fault(COMMIT, status=503),
        Fault(COMMIT, status=429),
        Fault(COMMIT, after=200, of_request=True),
        Fault(r"^GET /api/models/me/dog", status=504),
        Fault(r"/api/repos/create", status=503),
    ],
    ids=lambda fault: f"{fault.pattern} {fault.status or 'cut'} x{fault.times}",
)
def test_a_push_outlasts_what_passes(loopback_hub, pack, fault):
    loopback_hub.faults = [fault]
    push(loopback_hub, pack)
    assert fault.times == 0
    assert history(loopback_hub) == ["initial commit", "mine"]
    packs.assert_same_pack(EDLoRA.from_pretrained("me/dog"), pack)


def test_a_commit_whose_answer_is_lost_is_made_once(loopback_hub, pack):
    loopback_hub.faults = [Fault(COMMIT, done=True)]
    push(loopback_hub, pack)
    assert history(loopback_hub) == ["initial commit", "mine"]


@pytest.mark.parametrize(
    "fault",
    [
        Fault(LFS, after=700, of_request=True, times=99),
        Fault(LFS, done=True, reset=False, times=99),
        Fault(COMMIT, status=503, times=99),
    ],
)
def test_a_push_that_fails_leaves_no_half_commit_and_the_next_one_succeeds(loopback_hub, pack, fault):
    loopback_hub.faults = [fault]
    with pytest.raises(HubError, match="could not serve 'me/dog'"):
        push(loopback_hub, pack)
    assert history(loopback_hub) == ["initial commit"]
    assert loopback_hub.repositories["me/dog"].branches["main"][-1][2].keys() == {".gitattributes"}
    loopback_hub.faults = []
    push(loopback_hub, pack)
    packs.assert_same_pack(EDLoRA.from_pretrained("me/dog"), pack)


def test_who_was_faster_is_not_overwritten(loopback_hub, pack):
    push(loopback_hub, pack)
    repository = loopback_hub.repositories["me/dog"]

    def somebody_edits_the_card(repo_id):
        loopback_hub.before_commit = lambda repo_id: None
        text = repository.branches["main"][-1][2]["README.md"].decode()
        repository.commit("main", "theirs", {"README.md": (text + "\nA good dog.\n").encode(), "more.txt": b"x"})

    loopback_hub.before_commit = somebody_edits_the_card
    packs.random_pack(tiny.components(), seed=3).push_to_hub("me/dog", token=loopback_hub.token)
    assert history(loopback_hub)[1:] == ["mine", "theirs", "ED-LoRA of <rex>"]
    files = repository.branches["main"][-1][2]
    assert files["more.txt"] == b"x"
    assert files["README.md"].decode().endswith("\nA good dog.\n")


def test_a_branch_that_never_rests_is_an_error_of_ours(loopback_hub, pack):
    push(loopback_hub, pack)
    repository = loopback_hub.repositories["me/dog"]
    loopback_hub.before_commit = lambda repo_id: repository.commit("main", "theirs", {})
    with pytest.raises(HubError, match="keep committing"):
        packs.random_pack(tiny.components(), seed=3).push_to_hub("me/dog", token=loopback_hub.token)


def test_pushing_the_same_again_makes_no_commit(loopback_hub, pack):
    push(loopback_hub, pack)
    assert push(loopback_hub, pack) == f"{loopback_hub.url}/me/dog"
    assert history(loopback_hub) == ["initial commit", "mine"]


# --- pull requests, gates ---


def test_a_pull_request_leaves_main_alone(loopback_hub, components, pack):
    push(loopback_hub, pack)
    newer = packs.random_pack(components, seed=5)
    assert push(loopback_hub, newer, create_pr=True) == f"{loopback_hub.url}/me/dog/discussions/1"
    packs.assert_same_pack(EDLoRA.from_pretrained("me/dog"), pack)
    packs.assert_same_pack(EDLoRA.from_pretrained("me/dog", revision="refs/pr/1"), newer)
    with pytest.raises(ConfigurationError, match="not both"):
        push(loopback_hub, newer, create_pr=True, revision="try")


def test_a_pull_request_whose_answer_is_lost_is_not_opened_twice(loopback_hub, components, pack):
    push(loopback_hub, pack)
    loopback_hub.faults = [Fault(COMMIT, done=True)]
    with pytest.raises(HubError):
        push(loopback_hub, packs.random_pack(components, seed=5), create_pr=True)
    assert list(loopback_hub.repositories["me/dog"].branches) == ["main", "refs/pr/1"]


def test_a_gate_is_named(loopback_hub, pack):
    push(loopback_hub, pack)
    loopback_hub.repositories["me/dog"].gated = True
    with pytest.raises(HubError, match="Accept its terms"):
        EDLoRA.from_pretrained("me/dog")
    packs.assert_same_pack(EDLoRA.from_pretrained("me/dog", token=loopback_hub.token), pack)


# --- fetching ---


def test_a_download_that_breaks_goes_on_where_it_stopped(loopback_hub, pack, monkeypatch):
    push(loopback_hub, pack)
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 256)
    loopback_hub.faults = [Fault(DOWNLOAD, after=1024), Fault(DOWNLOAD, after=512)]
    packs.assert_same_pack(EDLoRA.from_pretrained("me/dog"), pack)
    assert loopback_hub.ranges == ["bytes=1024-", "bytes=1536-"]


@pytest.mark.parametrize(
    "fault", [Fault(DOWNLOAD, after=0, times=99), Fault(DOWNLOAD, status=500, times=99)], ids=["cut", "500"]
)
def test_a_download_that_fails_leaves_nothing_and_the_next_one_succeeds(loopback_hub, pack, tmp_path, fault):
    push(loopback_hub, pack)
    loopback_hub.faults = [fault]
    with pytest.raises((HubError, EDLoRANotFoundError)):
        EDLoRA.from_pretrained("me/dog", cache_dir=tmp_path / "mine")
    assert partial_files(tmp_path / "mine") == []
    loopback_hub.faults = []
    packs.assert_same_pack(EDLoRA.from_pretrained("me/dog", cache_dir=tmp_path / "mine"), pack)


@pytest.mark.parametrize("status", [500, 502, 503, 504, 429])
def test_a_busy_hub_is_asked_again(loopback_hub, pack, status):
    push(loopback_hub, pack)
    loopback_hub.faults = [Fault(r"^HEAD /me/dog/resolve", status=status), Fault(DOWNLOAD, status=status)]
    packs.assert_same_pack(EDLoRA.from_pretrained("me/dog"), pack)


def test_what_did_not_change_is_not_fetched_again(loopback_hub, pack):
    push(loopback_hub, pack)
    EDLoRA.from_pretrained("me/dog")
    loopback_hub.requests.clear()
    EDLoRA.from_pretrained("me/dog")
    assert not [request for request in loopback_hub.requests if request.startswith("GET")]


def test_a_broken_hub_is_no_obstacle_to_what_is_in_the_cache(loopback_hub, pack):
    push(loopback_hub, pack)
    EDLoRA.from_pretrained("me/dog")
    loopback_hub.faults = [Fault(".", status=503, times=99)]
    packs.assert_same_pack(EDLoRA.from_pretrained("me/dog"), pack)


# --- without a network ---


def test_offline_the_cache_answers_and_its_gaps_are_named(loopback_hub, pack, monkeypatch):
    push(loopback_hub, pack)
    EDLoRA.from_pretrained("me/dog")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    loopback_hub.requests.clear()
    packs.assert_same_pack(EDLoRA.from_pretrained("me/dog"), pack)
    with pytest.raises(EDLoRANotFoundError, match="HF_HUB_OFFLINE is set"):
        EDLoRA.from_pretrained("me/cat")
    with pytest.raises(HubError, match="HF_HUB_OFFLINE is set"):
        push(loopback_hub, pack)
    assert loopback_hub.requests == []


def test_offline_by_the_environment_the_command_line_says_so(tmp_path):
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    command = [sys.executable, "-m", "diffusers_mixofshow", "inspect", "me/dog"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode != 0
    assert "HF_HUB_OFFLINE is set" in " ".join(result.stderr.split())
    assert "Traceback" not in result.stderr


# --- secrets ---


@pytest.mark.parametrize("status", [400, 401, 403, 500])
def test_a_token_that_the_hub_repeats_is_not_shown(loopback_hub, pack, monkeypatch, status):
    push(loopback_hub, pack)
    secret = "hf_abcdefghijklmnopqrstuvwxyz01234567"
    monkeypatch.setenv("HF_TOKEN", secret)
    original = loopback_hub._server.RequestHandlerClass._json

    def repeating(handler, code, value, headers=None):
        if code < 400:
            return original(handler, code, value, headers)
        said = f"Bearer {secret} is not allowed"
        return original(handler, code, {"error": said}, {**(headers or {}), "X-Error-Message": said})

    monkeypatch.setattr(loopback_hub._server.RequestHandlerClass, "_json", repeating)
    loopback_hub.faults = [Fault(r"/resolve/|create", status=status, times=99)]
    for action in (lambda: EDLoRA.from_pretrained("me/dog"), lambda: pack.push_to_hub("me/dog")):
        with pytest.raises((HubError, EDLoRANotFoundError)) as caught:
            action()
        shown = "".join(traceback.format_exception(caught.value))
        assert secret not in shown


def test_the_card_knows_nothing_of_this_machine_or_its_user(loopback_hub, pack, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", loopback_hub.token)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    push(loopback_hub, pack)
    text = loopback_hub.repositories["me/dog"].branches["main"][-1][2]["README.md"].decode()
    assert ModelCard(text).data.base_model == "someone/tiny"
    assert loopback_hub.token not in text
    assert not re.search(r"/tmp|/home|/root", text)
