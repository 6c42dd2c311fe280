"""Saving where it cannot succeed: what was there stays, nothing is half-written, and the error says what to do."""

from __future__ import annotations

import dataclasses
import os
import resource
import signal
import subprocess
import time

import pytest
import torch

from diffusers_mixofshow.atomic import write_whole
from diffusers_mixofshow.edlora import EDLoRA
from diffusers_mixofshow.errors import FileWriteError
from diffusers_mixofshow.fusion.published import SourceStatistics
from diffusers_mixofshow.fusion.statistics import ConceptStatistics
from diffusers_mixofshow.interop.lora_files import write_lora
from hostile.killed import forked, kill, number_of, save_for_ever, version


def statistics():
    concept = ConceptStatistics()
    concept.add("one", torch.randn(300, 256))
    return SourceStatistics(digest="ab", base_model="tiny", recording={}, concepts={"<rex>": concept})


WRITERS = {
    "ED-LoRA": lambda folder: version(2).save_pretrained(folder, overwrite=True),
    "statistics": lambda folder: statistics().save(
        folder / "edlora.statistics.safetensors", max_bytes=None, overwrite=True
    ),
    "LoRA": lambda folder: write_lora(folder / "lora.safetensors", version(2).lora),
    "any file": lambda folder: write_whole(folder / "x", bytes(2**20)),
}


@pytest.fixture(params=WRITERS, ids=str)
def writer(request):
    return WRITERS[request.param]


@pytest.fixture
def full_disk(tmp_path):
    """A disk of 300 kB, where this process may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("no permission to mount a small disk")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture
def small_files():
    """No file may grow beyond 100 kB, as with a quota."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def refused(writer, folder):
    before = contents(folder)
    with pytest.raises(FileWriteError, match="cannot be written"):
        writer(folder)
    assert contents(folder) == before


def test_a_full_disk(full_disk, writer):
    version(1, sites=1).save_pretrained(full_disk)
    refused(writer, full_disk)
    assert number_of(full_disk) == 1


def test_a_quota(tmp_path, small_files, writer):
    (tmp_path / "edlora.safetensors").write_bytes(b"old")
    refused(writer, tmp_path)


def test_a_file_where_a_folder_should_be(tmp_path, writer):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileWriteError, match="cannot be written"):
        writer(tmp_path / "file")
    assert contents(tmp_path) == {"file": b"mine"}


def test_a_folder_where_the_file_should_be(tmp_path):
    (tmp_path / "edlora.safetensors").mkdir()
    refused(WRITERS["ED-LoRA"], tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_folder_without_permission(tmp_path, writer):
    tmp_path.chmod(0o500)
    refused(writer, tmp_path)


def test_a_pipe_or_link_in_place_of_the_file_is_replaced_not_followed(tmp_path):
    for make in (os.mkfifo, lambda path: path.symlink_to(tmp_path / "private")):
        folder = tmp_path / make.__name__.strip("<>")
        folder.mkdir()
        (tmp_path / "private").write_text("mine")
        make(folder / "edlora.safetensors")
        version(1, sites=1).save_pretrained(folder, overwrite=True)
        assert number_of(folder) == 1
        assert (tmp_path / "private").read_text() == "mine"


def test_what_a_pack_cannot_say_is_refused_before_anything_is_written(tmp_path):
    for odd in (
        dataclasses.replace(version(1), base_model="m" * 10_000),
        dataclasses.replace(version(1), training={"text": "x" * (5 * 2**20)}),
    ):
        with pytest.raises(ValueError, match=r"cannot be saved|longer than"):
            odd.save_pretrained(tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_leftovers_of_killed_processes_are_swept_and_those_of_living_ones_stay(tmp_path):
    old, new = tmp_path / ".x.0000.tmp", tmp_path / ".x.1111.tmp"
    other = tmp_path / ".y.0000.tmp"
    for path in (old, new, other):
        path.write_bytes(b"half")
    for path in (old, other):
        os.utime(path, (time.time() - 7200,) * 2)
    write_whole(tmp_path / "x", b"whole")
    assert sorted(contents(tmp_path)) == [".x.1111.tmp", ".y.0000.tmp", "x"]


def test_two_processes_that_write_the_same_file(tmp_path):
    version(1).save_pretrained(tmp_path)
    children = [forked(save_for_ever, tmp_path, numbers) for numbers in ((1,), (2,))]
    try:
        seen = {number_of(tmp_path) for _ in range(30)}
    finally:
        for child in children:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    assert seen <= {1, 2}
    assert number_of(tmp_path) in {1, 2}


def test_killed_at_random_points_the_old_file_or_the_new_one_is_there(tmp_path):
    told = kill(20, 0, tmp_path)
    assert told["old"] + told["new"] == 20
    assert told["new"] > 0
    assert isinstance(EDLoRA.from_pretrained(tmp_path), EDLoRA)
