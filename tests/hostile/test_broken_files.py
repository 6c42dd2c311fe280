"""Every broken file is one clear error of ours: from Python, at the command line, in little memory and time."""

from __future__ import annotations

import os
import re
import resource
import signal
import sys
from contextlib import contextmanager

import pytest

import packs
import tiny
from diffusers_mixofshow import cli
from diffusers_mixofshow.edlora import EDLoRA
from diffusers_mixofshow.errors import EDLoRAFormatError, EDLoRANotFoundError, MixOfShowError
from diffusers_mixofshow.pipelines import MixOfShowPipeline
from hostile.broken import CASES, FILE, Case, make


LONGEST_MESSAGE = 8000
LONGEST_S = 20
MOST_MEMORY_MB = 200
CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e]")


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    return make(tmp_path_factory.mktemp("sound"))


@contextmanager
def in_time():
    """Fail instead of waiting for ever, as on a pipe that nobody writes to."""

    def too_long(*_):
        raise TimeoutError(f"took more than {LONGEST_S} s")

    before = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(LONGEST_S)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def put(case: Case, sound, folder):
    if case.root_may and os.geteuid() == 0:
        pytest.skip("root reads everything")
    (folder / "pack").mkdir()
    return case.put(sound, folder / "pack")


def command_line(monkeypatch, *arguments):
    """Exit code of the command line."""
    monkeypatch.setattr(sys, "argv", ["mixofshow", *map(str, arguments)])
    try:
        cli.main()
    except SystemExit as end:
        return end.code
    return 0


def test_there_are_enough_cases():
    assert len(CASES) >= 60
    assert len({case.name for case in CASES}) == len(CASES)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_broken_file_is_one_clear_error(case, sound, tmp_path, monkeypatch, capsys):
    path = put(case, sound, tmp_path)
    before = sorted(os.listdir(tmp_path / "pack"))
    with in_time(), pytest.raises((EDLoRAFormatError, EDLoRANotFoundError)) as caught:
        EDLoRA.from_pretrained(path.parent)
    message = str(caught.value)
    assert re.search(case.says, message)
    assert len(message) < LONGEST_MESSAGE
    assert not CONTROLS.search(message)
    assert "attacked" not in os.listdir(path.parent)

    with in_time():
        code = command_line(monkeypatch, "inspect", path.parent)
    output = capsys.readouterr()
    assert code in (1, 2)
    assert "Traceback" not in output.out + output.err
    assert not CONTROLS.search(output.err.replace("\x1b[31m", "").replace("\x1b[0m", ""))
    assert sorted(os.listdir(tmp_path / "pack")) == before


def test_no_broken_file_takes_much_memory(sound, tmp_path):
    """All of them in one process whose memory counts from here."""
    places = []
    for number, case in enumerate(CASES):
        (tmp_path / str(number)).mkdir()
        places.append(case.put(sound, tmp_path / str(number)).parent)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for place in places:
            try:
                EDLoRA.from_pretrained(place)
            except MixOfShowError:
                continue
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start
        os.write(writing, str(grown).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as answer:
        grown_mb = int(answer.read()) / 1024
    assert os.waitpid(child, 0)[1] == 0
    assert grown_mb < MOST_MEMORY_MB


@pytest.mark.parametrize("source", ["x" * 10_000, "a\0b", "/dev/null/edlora", "~nobody/x", "", "."])
def test_names_of_places_that_cannot_be(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((EDLoRAFormatError, EDLoRANotFoundError)):
        EDLoRA.from_pretrained(source)


@pytest.mark.parametrize("where", ["/dev/zero", "/dev/stdin"])
def test_a_device_given_by_name_is_not_read(where):
    with in_time(), pytest.raises(EDLoRAFormatError, match="a pipe, socket or device"):
        EDLoRA.from_pretrained(where)


# --- links ---


def test_a_folder_on_the_way_that_is_a_link_is_not_followed(sound, tmp_path):
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / FILE).write_bytes(sound.raw)
    (tmp_path / "repo").mkdir()
    (tmp_path / "repo" / "sub").symlink_to(tmp_path / "private")
    for subfolder in ("sub", "../private", str(tmp_path / "private")):
        with pytest.raises(EDLoRAFormatError, match="not followed"):
            EDLoRA.from_pretrained(tmp_path / "repo", subfolder=subfolder)


def test_links_inside_a_folder_and_those_of_the_cache_are_followed(sound, tmp_path):
    (tmp_path / "pack").mkdir()
    (tmp_path / "pack" / "real").write_bytes(sound.raw)
    (tmp_path / "pack" / FILE).symlink_to("real")
    snapshot = tmp_path / "models--me--dog" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (tmp_path / "models--me--dog" / "blobs").mkdir()
    (tmp_path / "models--me--dog" / "blobs" / "abc").write_bytes(sound.raw)
    (snapshot / FILE).symlink_to("../../blobs/abc")
    (tmp_path / "linked").symlink_to(tmp_path / "pack")
    for folder in ("pack", "linked", snapshot):
        assert EDLoRA.from_pretrained(tmp_path / folder).concepts[0].name == "rex"


def test_a_link_in_the_cache_does_not_lead_out_of_its_repository(sound, tmp_path):
    snapshot = tmp_path / "models--me--dog" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (tmp_path / "models--me--dog" / "blobs").mkdir()
    (tmp_path / "secret").write_bytes(sound.raw)
    (snapshot / FILE).symlink_to(tmp_path / "secret")
    with pytest.raises(EDLoRAFormatError, match="not followed"):
        EDLoRA.from_pretrained(snapshot)


# --- a sound file of something else ---


def test_another_bases_layers_and_words_of_the_tokenizer_leave_a_pipeline_as_it_was(tmp_path):
    components = tiny.components()
    pipe = MixOfShowPipeline(**components, requires_safety_checker=False)
    before = {name: value.clone() for name, value in pipe.unet.state_dict().items()}
    pack = packs.random_pack(components)
    text = (pack.save_pretrained(tmp_path / "a")).read_bytes()
    other = text.replace(b"mid_block", b"mud_block").replace(b"down_blocks.1", b"down_blocks.7")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / FILE).write_bytes(other)
    with pytest.raises(EDLoRAFormatError, match="does not fit the model"):
        pipe.load_edlora(tmp_path / "b")
    pipe.tokenizer.add_tokens(["<rex1>"])
    with pytest.raises(MixOfShowError, match="already knows <rex1>"):
        pipe.load_edlora(tmp_path / "a")
    after = pipe.unet.state_dict()
    assert before.keys() == after.keys()
    assert all(value.equal(after[name]) for name, value in before.items())
