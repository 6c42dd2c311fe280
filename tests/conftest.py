"""Fixtures that several test modules share."""

from __future__ import annotations

import gc
import os
import signal

import pytest


# Read when torch is first imported, here and in every process that a test starts: on models this small several threads
# only wait for each other, and on a busy machine for minutes.
os.environ.setdefault("OMP_NUM_THREADS", "1")


# Tests send Ctrl-C themselves: in background jobs of a shell it is ignored, and a training leaves what is ignored so.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish() -> None:
    """What is imported by now stays; accelerate collects garbage after every training, and would look through it."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module")
def components():
    """The parts of a tiny random model, by name."""
    import tiny

    return tiny.components()


@pytest.fixture(scope="module")
def pack(components):
    """A random ED-LoRA of `components`, with one concept."""
    import packs

    return packs.random_pack(components)


@pytest.fixture
def loopback_hub(monkeypatch, tmp_path):
    """A Hub on loopback that the real huggingface_hub client talks to, with an empty cache and nobody logged in."""
    import huggingface_hub

    from hub.loopback import LoopbackHub

    with LoopbackHub() as hub:
        constants = huggingface_hub.constants
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", hub.url)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield hub
