"""The page on a real server, as Gradio's own client sees it; and what it says where Gradio is missing."""

from __future__ import annotations

import json
import sys
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from diffusers_mixofshow.errors import ConfigurationError, MissingExtraError, MixOfShowWarning
from diffusers_mixofshow.fusion.report import TITLE
from diffusers_mixofshow.sampling.provenance import read_options
from diffusers_mixofshow.ui import actions, page
from diffusers_mixofshow.ui.session import Session, Studio


def test_where_gradio_is_missing_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, studio: Studio) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(MissingExtraError, match=r'pip install "diffusers-mixofshow\[ui\]"'):
        page.build_page(studio)


@pytest.fixture(scope="module")
def server(studio: Studio) -> Iterator[str]:
    pytest.importorskip("gradio", reason="the extra ui is not installed")
    blocks = page.build_page(studio)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
        _, url, _ = blocks.launch(
            **page.get_launch_settings(), server_name="127.0.0.1", prevent_thread_lock=True, quiet=True
        )
        yield url
        blocks.close()


def user(server: str):
    from gradio_client import Client

    return Client(server, verbose=False)


def ask(
    client, canvas: dict, prompt: str, *, seed: float | None = 0, steps: float | None = 2, guidance: float = 3.0
) -> tuple:
    return client.predict(canvas, prompt, "", seed, steps, guidance, False, False, False, False, api_name="/draw")


def canvas_of(prompt: str) -> dict:
    return {"width": 64, "height": 64, "regions": [{"prompt": prompt, "box": [0, 0.2, 0.5, 1]}]}


def test_a_port_that_is_taken_is_told(server: str, studio: Studio) -> None:
    blocks, port = page.build_page(studio), int(server.rstrip("/").rpartition(":")[2])
    with pytest.raises(ConfigurationError, match=f"{port}.*Choose another --port"):
        page.launch(blocks, port=port, share=False, browser=False)


def test_it_listens_on_this_machine_alone_and_sends_nothing_home(server: str) -> None:
    import gradio

    assert server.startswith("http://127.0.0.1:")
    assert not gradio.analytics.analytics_enabled()


def test_a_picture_is_drawn_with_its_settings(server: str) -> None:
    client = user(server)
    picture, overlay, png, _ = ask(client, canvas_of("a brown dog"), "a dog in the snow", seed=5)
    told = read_options(Path(png["value"]))
    assert png["interactive"]
    assert (told["seed"], told["steps"], told["base"]) == (5, 2, "toyland")
    assert read_options(Path(picture))["seed"] == 5
    with Image.open(overlay) as drawn:
        assert min(drawn.size) >= 512
    layout = client.predict(canvas_of("a brown dog"), "a dog in the snow", "", api_name="/save_layout")
    assert json.loads(Path(layout).read_text())["regions"][0]["prompt"] == "a brown dog"


def test_before_there_is_a_picture_only_the_layout_can_be_saved(server: str, studio: Studio) -> None:
    shown = [part["props"] for part in page.build_page(studio).get_config_file()["components"]]
    usable = {each.get("label") or each.get("value"): each["interactive"] for each in shown if "interactive" in each}
    assert not usable["Picture with its settings (PNG)"]
    assert usable["Layout (JSON)"]
    layout = user(server).predict(canvas_of("a red vase"), "", "a cat", api_name="/save_layout")
    told = json.loads(Path(layout).read_text())
    assert (told["regions"][0]["prompt"], told["negative_prompt"]) == ("a red vase", "a cat")
    with pytest.raises(Exception, match="region 1 has no prompt"):
        user(server).predict(canvas_of(""), "", "", api_name="/save_layout")


@pytest.mark.parametrize("switches", [(True, False, True, False), (False, True, False, True)])
def test_every_setting_comes_back_from_a_picture_into_its_field(server: str, switches: tuple[bool, ...]) -> None:
    from gradio_client import handle_file

    client = user(server)
    asked = (canvas_of("a brown dog"), "a dog in the snow", "a cat", 7, 2, 2.5, *switches)
    _, _, png, followed = client.predict(*asked, api_name="/draw")
    assert followed["visible"] is switches[3]  # the layout condition
    canvas, *fields = client.predict(handle_file(png["value"]), api_name="/read_layout")
    regions = canvas["value"]["regions"] if "value" in canvas else canvas["regions"]
    assert regions[0]["prompt"] == "a brown dog"
    assert fields == ["a dog in the snow", "a cat", 7, 2, 2.5, *switches]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": None}, "Seed is empty"),
        ({"steps": None}, "Steps is empty"),
        ({"seed": 1.5}, "Seed is 1.5"),
        ({"steps": 0}, "Got 0 steps; expected 1 to 200."),
        ({"steps": -3, "guidance": 101}, "Got -3 steps; expected 1 to 200; a guidance of 101.0; expected 0 to 100."),
        ({"seed": 2**70}, "expected one of at most 63 bits"),
    ],
)
def test_a_number_field_without_its_number_is_named(
    server: str, changes: dict, message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(Exception, match=message.replace(".", r"\.")):
        ask(user(server), canvas_of("a brown dog"), "a dog in the snow", **changes)
    assert "Traceback" not in capfd.readouterr().err


def test_it_opens_with_draft_and_refine_on_and_tells_the_base(server: str, studio: Studio) -> None:
    shown = [part["props"] for part in page.build_page(studio).get_config_file()["components"]]
    on = {each["label"]: each["value"] for each in shown if each.get("label") in ("Draft", "Refine", "Isolation")}
    assert on == {"Draft": True, "Refine": True, "Isolation": False}
    assert any("it can draw critter, dog, cat" in str(each.get("value")) for each in shown)


def test_the_example_of_a_prompt_is_drawn_without_a_warning(studio: Studio) -> None:
    pytest.importorskip("gradio", reason="the extra ui is not installed")
    shown = [part["props"] for part in page.build_page(studio).get_config_file()["components"]]
    (example,) = [each["placeholder"] for each in shown if each.get("label") == "Global prompt"]
    wishes = actions.Wishes(prompt=example, steps=2, draft=False, refine=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error", MixOfShowWarning)
        actions.draw_picture(studio, Session(), {"width": 64, "height": 64, "regions": []}, wishes)


def test_a_refused_file_is_named_without_its_folder(server: str, tmp_path: Path) -> None:
    from gradio_client import handle_file

    (tmp_path / "bad.safetensors").write_bytes(b"not a file")
    with pytest.raises(Exception, match=r"(?s)bad\.safetensors") as raised:
        user(server).predict([handle_file(tmp_path / "bad.safetensors")], api_name="/load_files")
    assert "gradio/" not in str(raised.value)


def test_what_one_user_loads_another_does_not_see(server: str, packs: dict[str, Path]) -> None:
    from gradio_client import handle_file

    first, second = user(server), user(server)
    loaded = first.predict([handle_file(packs["rex"])], api_name="/load_files")
    table, packs_to_unload, completions = loaded
    assert table["value"]["data"][0][1] == "<rex>"
    assert packs_to_unload["choices"] == [["rex", "rex"]]
    assert completions["props"]["concepts"] == ["<rex>"]  # what the prompts of regions may name
    second.predict([handle_file(packs["tom"])], api_name="/load_files")
    ask(first, canvas_of("a <rex>"), "a <rex>")
    with pytest.raises(Exception, match="<rex>".replace("<", "&lt;").replace(">", "&gt;")):
        ask(second, canvas_of("a <rex>"), "a meadow")
    with ThreadPoolExecutor(2) as pool:
        both = [
            pool.submit(ask, client, canvas_of(f"a <{name}>"), "-")
            for client, name in ((first, "rex"), (second, "tom"))
        ]
        assert [Path(one.result()[0]).stat().st_size > 0 for one in both] == [True, True]
    table, _, completions = first.predict("rex", api_name="/unload")
    assert table["value"]["data"] == completions["props"]["concepts"] == []


def test_files_are_fused_and_handed_out(server: str, packs: dict[str, Path]) -> None:
    from gradio_client import handle_file

    files = [handle_file(path) for path in packs.values()]
    table, meaning, handed = user(server).predict(files, "", "average", "", api_name="/fuse")
    assert table["headers"][0] == "concept"
    assert [row[0] for row in table["data"]] == ["<rex>", "<tom>"]
    assert "edlora.safetensors" in [Path(path).name for path in handed]
    assert meaning


def test_the_page_is_told_how_far_fusing_is(server: str, packs: dict[str, Path]) -> None:
    from gradio_client import handle_file

    files = [handle_file(path) for path in packs.values()]
    job = user(server).submit(files, "", "closed-form", "", api_name="/fuse")
    told = []
    while not job.done():
        told += job.status().progress_data or []
        time.sleep(0.05)
    assert len(job.result()) == 3
    assert any(each.desc.startswith("Recording") and 0 < each.index <= each.length for each in told)


def test_the_page_says_which_method_to_choose(studio: Studio) -> None:
    pytest.importorskip("gradio", reason="the extra ui is not installed")
    shown = [part["props"] for part in page.build_page(studio).get_config_file()["components"]]
    (method,) = [each for each in shown if each.get("label") == "Method"]
    assert method["info"].startswith(f"{method['value']} keeps most")


def test_files_to_fuse_are_told_by_their_concepts(server: str, packs: dict[str, Path]) -> None:
    from gradio_client import handle_file

    client = user(server)
    told = client.predict([handle_file(path) for path in packs.values()], api_name="/tell_contents")
    assert told["visible"]
    assert told["value"].splitlines() == ["edlora.safetensors: <rex>", "edlora.safetensors: <tom>"]
    assert not client.predict([], api_name="/tell_contents")["visible"]


def test_the_fused_pack_is_loaded_for_drawing(server: str, packs: dict[str, Path]) -> None:
    from gradio_client import handle_file

    client = user(server)
    client.predict([handle_file(packs["rex"])], api_name="/load_files")
    _, _, handed = client.predict([handle_file(path) for path in packs.values()], "", "sum", "", api_name="/fuse")
    table, _, completions = client.predict([handle_file(path) for path in handed], api_name="/load_fused")
    assert [row[:2] for row in table["value"]["data"]] == [["rex, tom", "<rex>"], ["rex, tom", "<tom>"]]
    assert completions["props"]["concepts"] == ["<rex>", "<tom>"]


def test_what_is_loaded_for_drawing_is_offered_for_fusing(server: str, packs: dict[str, Path]) -> None:
    from gradio_client import handle_file

    client = user(server)
    assert not client.predict([], api_name="/list_loaded")["visible"]
    client.predict([handle_file(packs["rex"])], api_name="/load_files")
    for chosen in ([], ["rex"]):
        offered = client.predict(chosen, api_name="/list_loaded")
        assert (offered["choices"], offered["value"], offered["visible"]) == ([["rex", "rex"]], chosen, True)
    table, _, _ = client.predict([handle_file(packs["tom"])], "", "sum", "", ["rex"], api_name="/fuse")
    assert [row[0] for row in table["data"]] == ["<tom>", "<rex>"]
    client.predict("rex", api_name="/unload")
    with pytest.raises(Exception, match="rex is not loaded any more"):
        client.predict([handle_file(packs["tom"])], "", "sum", "", ["rex"], api_name="/fuse")
    offered = client.predict(["rex"], api_name="/list_loaded")
    assert (offered["choices"], offered["value"], offered["visible"]) == ([], [], False)


def test_a_card_is_shown_with_what_strangers_wrote_escaped(server: str, packs: dict[str, Path]) -> None:
    from gradio_client import handle_file

    facts, concepts, notes, card = user(server).predict(handle_file(packs["rex"]), api_name="/look_into_file")
    assert ["kind", "ED-LoRA"] in facts["data"]
    assert concepts["data"][0][0] == "<rex>"
    assert notes == "none"
    assert "<img" not in card


@pytest.mark.parametrize("typed", ["", "nowhere/at-all/x", "no-such-folder/edlora.safetensors"])
def test_errors_are_sentences(server: str, typed: str) -> None:
    from gradio_client.exceptions import AppError

    with pytest.raises(AppError) as raised:
        user(server).predict(typed, api_name="/look")
    assert "Traceback" not in str(raised.value)
    assert len(str(raised.value)) > 20


def test_a_file_that_is_too_large_is_not_taken(server: str, tmp_path: Path) -> None:
    from gradio_client import handle_file

    large = tmp_path / "large.safetensors"
    with large.open("wb") as file:
        file.truncate(513 * 2**20)
    with pytest.raises(Exception, match=r"413|size|large"):
        user(server).predict(handle_file(large), api_name="/look_into_file")


def test_an_error_marks_at_most_the_field_that_it_is_about(studio: Studio) -> None:
    """Gradio marks every result of a call that failed, unless it is told where to show how the call goes."""
    pytest.importorskip("gradio", reason="the extra ui is not installed")
    config = page.build_page(studio).config
    labels = {part["id"]: part["props"].get("label") or part["props"].get("value") for part in config["components"]}
    marked = {
        call["api_name"]: [labels[one] for one in call["show_progress_on"] or call["outputs"]]
        for call in config["dependencies"]
        if call["api_visibility"] == "public"
    }
    assert marked == {
        "load": ["Or drop files"],
        "load_files": ["Or drop files"],
        "load_fused": ["The fused pack"],
        "unload": ["Unload"],
        "draw": ["Picture"],
        "save_layout": ["Layout (JSON)"],
        "read_layout": ["Load a layout (JSON) or a picture with its settings (PNG)"],
        "tell_contents": ["Drop files"],
        "list_loaded": ["Drop files"],
        "fuse": [TITLE],
        "look_into_file": ["Drop a file"],
        "look": ["Facts"],
    }


def test_how_a_call_goes_is_shown_where_it_is_seen(studio: Studio) -> None:
    pytest.importorskip("gradio", reason="the extra ui is not installed")
    config = page.build_page(studio).config
    seen = {part["id"] for part in config["components"] if part["props"].get("visible") is True}
    calls = [call for call in config["dependencies"] if call["api_visibility"] == "public"]
    assert len(calls) == 12
    assert all(seen.issuperset(call["show_progress_on"]) for call in calls)


def test_a_base_that_draws_no_concepts_is_refused_with_what_takes_it() -> None:
    pytest.importorskip("gradio", reason="the extra ui is not installed")
    studio = Studio("toyland-sd3", "cpu")
    with pytest.raises(ConfigurationError, match=r"'toyland-sd3'.* cannot.*mixofshow fuse`.*mixofshow sample`"):
        page.build_page(studio)
    assert "pipe" not in vars(studio)  # it was not loaded first


SHOWN = Path(__file__).with_name("page.txt")
_TOLD = (
    *("label", "placeholder", "info", "lines", "minimum", "maximum", "step", "file_types", "file_count", "headers"),
    *("choices", "interactive", "visible", "variant", "elem_id", "open", "precision", "apply_default_css", "concepts"),
)
_OF_CALLS = ("api_name", "api_visibility", "show_progress", "trigger_mode")


def _tell_page(blocks: Any) -> str:
    """Every part of the page and every call that it makes, a line each, as Gradio sends it to the browser."""
    lines = []
    for part in blocks.config["components"]:
        props = dict(part["props"])
        told = {name: props[name] for name in _TOLD if props.get(name) not in (None, "")}
        if part["type"] in ("markdown", "button", "textbox", "number", "checkbox", "dropdown"):
            told["value"] = props.get("value")
        lines.append(f"{part['type']} {json.dumps(told, sort_keys=True)}")
    ids = {part["id"]: f"{number} {part['type']}" for number, part in enumerate(blocks.config["components"])}
    for call in blocks.config["dependencies"]:
        told = {name: call.get(name) for name in _OF_CALLS}
        for side in ("inputs", "outputs"):
            told[side] = [ids[one] for one in call[side]]
        lines.append(f"call {json.dumps(told, sort_keys=True)}")
    return "\n".join(lines) + "\n"


def test_the_page_shows_and_asks_what_it_did_on_an_earlier_day(studio: Studio) -> None:
    """`python tests/ui/test_page.py` writes page.txt anew, after a change that is meant or with another Gradio."""
    pytest.importorskip("gradio", reason="the extra ui is not installed")
    assert _tell_page(page.build_page(studio)) == SHOWN.read_text(encoding="utf-8")


if __name__ == "__main__":
    SHOWN.write_text(_tell_page(page.build_page(Studio("toyland", "cpu"))), encoding="utf-8")
