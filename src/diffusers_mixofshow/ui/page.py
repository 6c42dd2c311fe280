"""The page itself: Gradio's components, and the actions that they call."""

from __future__ import annotations

import dataclasses
import functools
import html
import os
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from diffusers_mixofshow.base_models import usual_guidance
from diffusers_mixofshow.errors import (
    ConfigurationError,
    MissingExtraError,
    MixOfShowError,
    MixOfShowWarning,
    first_line,
)
from diffusers_mixofshow.fusion.report import TITLE
from diffusers_mixofshow.progress import Listener, listen
from diffusers_mixofshow.sampling.other_families import find_other_family
from diffusers_mixofshow.ui import actions, canvas
from diffusers_mixofshow.ui.conditions import has_layout_condition
from diffusers_mixofshow.ui.session import Session, Studio


LARGEST_UPLOAD = "512mb"
"""Largest file that may be uploaded to the page."""
_ENDINGS = [".safetensors", ".pth", ".pt", ".bin"]
_KEPT = (600, 4 * 3600)
"""How often Gradio deletes old files, and the age at which a file is old, in seconds."""
_ONE_BY_ONE = {"concurrency_id": "the base model", "concurrency_limit": 1}
"""Gradio's settings of calls of the base model, which wait for each other."""
_HERE = "127.0.0.1"
_WISHES = tuple(field.name for field in dataclasses.fields(actions.Wishes))
"""The fields beside the canvas, in the order in which the page sends them."""
_DRAW = "draw"
"""Name by which the tab for drawing is selected."""
_CLOSE_MESSAGES = """(...fields) => {
  document.querySelectorAll(".toast-close.error, .toast-close.warning").forEach((button) => button.click());
  return fields;
}"""
"""Runs in the browser before an action, and passes the fields on to it."""
_HAND_OUT = """(file) => {
  const link = document.createElement("a");
  [link.href, link.download] = [file.url, file.orig_name];
  document.body.append(link);
  link.click();
  link.remove();
}"""
"""Runs in the browser after a file is written, and downloads it."""
_HEADING = "# Mix-of-Show\nSeveral of your own concepts in one picture, each in its place."
_EXAMPLE = "a dog and a vase in a meadow"
"""Global prompt that the page shows as an example, of words that every base draws."""
_WHAT_TO_DO = "Draw boxes, say what is in each and what the whole picture shows, then press *Draw*."

_WHICH_METHOD = (
    "closed-form keeps most of each concept's looks. Take average where it takes too long, or where the trigger words "
    "of a plain LoRA are not known; the others are for comparing."
)

_SMALL = 256
"""Pictures of a base whose shorter side has fewer pixels are shown enlarged."""
_CSS = """
.small .image-frame { width: 100% !important; }
.small img { width: 100% !important; height: auto !important; object-fit: contain; image-rendering: pixelated; }
.zone [data-testid="status-tracker"]:has(.error) { display: none; }
#card table { display: block; max-width: 100%; overflow-x: auto; }
#card table :is(th, td) { word-break: normal; overflow-wrap: normal; }
"""
"""Gradio shows a picture no larger than it is, and smooths it where it has to. After an error it covers the drop zone
where the user would drop another file. Tables of Markdown it breaks within words where the window is narrow."""

_WORDS = {"common.complete": "Done"}
"""What screen readers are told after a call; Gradio itself has no words under this key, and tells them the key."""

Borrow = Callable[[Callable[..., Any]], Callable[..., Any]]
"""A decorator of functions that need a GPU, such as ``spaces.GPU``."""


def import_gradio() -> Any:
    """Import Gradio, with its analytics switched off.

    Raises:
        MissingExtraError: If it is not installed.
    """
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    try:
        import gradio
    except ImportError as error:
        raise MissingExtraError(
            f"The page needs Gradio, which cannot be imported: {first_line(error)}. Install it with pip install "
            '"diffusers-mixofshow[ui]".'
        ) from error
    return gradio


def build_page(studio: Studio, borrow: Borrow = lambda function: function) -> Any:
    """Make the page, as Gradio's Blocks.

    Args:
        studio: The state that all users share.
        borrow: Wraps functions that need a GPU, on hosts that lend one for each call.

    Raises:
        MissingExtraError: If Gradio is not installed.
        MixOfShowError: If the base model cannot be loaded, or draws no concepts.
    """
    gradio = import_gradio()
    if (family := find_other_family(studio.base, ())) is not None:
        raise ConfigurationError(
            f"The page draws concepts in regions, which {studio.base!r}, a base of {family.name}, cannot. Take one of "
            "Stable Diffusion or Stable Diffusion XL, or leave out --base. Plain LoRAs for it are fused with "
            "`mixofshow fuse`, and prompts are drawn with `mixofshow sample`."
        )
    actions.own_pixels(studio)  # loads the base, so that errors show before anybody opens the page
    with gradio.Blocks(title="Mix-of-Show", analytics_enabled=False, delete_cache=_KEPT) as page:
        gradio.Markdown(f"{_HEADING}\n\n{actions.tell_base(studio)} {_WHAT_TO_DO}")
        with gradio.Tabs() as tabs:
            with gradio.Tab("Draw", id=_DRAW):
                drawing = _DrawTab(gradio, studio, borrow)
            with gradio.Tab("Fuse") as fusing:
                drawing.offer(_add_fuse_tab(gradio, studio, borrow, drawing.session, fusing), tabs)
            with gradio.Tab("Look into a file"):
                _add_file_tab(gradio, studio)
    return page.queue()


def launch(page: Any, *, port: int | None, share: bool, browser: bool) -> None:
    """Serve the page until the user interrupts; only this machine can reach it unless it is shared.

    Args:
        page: The page from `build_page`.
        port: Port on this machine; None for the first free one from 7860 on.
        share: Whether Gradio makes a public link to the page.
        browser: Whether to open it in a browser.

    Raises:
        ConfigurationError: If the port is taken.
    """
    try:
        page.launch(**get_launch_settings(), server_name=_HERE, server_port=port, share=share, inbrowser=browser)
    except OSError as error:
        raise ConfigurationError(f"The page cannot be shown: {first_line(error)}. Choose another --port.") from error


def get_launch_settings() -> dict[str, Any]:
    """Arguments of `launch` that hold on every host: a limit on uploads, and no fonts or links from other servers."""
    gradio = import_gradio()
    theme = gradio.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    looks = {"theme": theme, "css": _CSS, "i18n": gradio.I18n(en=_WORDS), "footer_links": []}
    return {**looks, "max_file_size": LARGEST_UPLOAD, "ssr_mode": False}


_warnings_are_caught = threading.Lock()


def _tell_errors(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a function so that Gradio shows our errors and warnings, as texts and never as HTML.

    `warnings.catch_warnings` acts on all threads, so that a lock lets one call at a time run.
    """
    gradio = import_gradio()

    @functools.wraps(function)
    def call(*given: Any) -> Any:
        with _warnings_are_caught, warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", MixOfShowWarning)
            try:
                result = function(*given)
            except MixOfShowError as error:
                told = _as_text(error)
                raise gradio.Error(told, duration=_reading_time(told), print_exception=False) from error
        for each in caught:
            if issubclass(each.category, MixOfShowWarning):
                _warn(each.message)
        return result

    return call


def _as_text(message: object) -> str:
    """Word a message for the page and escape it: Gradio renders it as HTML, and it may quote texts of strangers."""
    return html.escape(actions.word_for_page(message, _list_upload_folders()), quote=False)


def _warn(message: object) -> None:
    told = _as_text(message)
    import_gradio().Warning(told, duration=_reading_time(told))


def _reading_time(text: str) -> float:
    """Seconds for which a message stays: it covers fields, so that it has to go by itself, but not unread."""
    return 8 + len(text) / 10


def _list_upload_folders() -> list[Path]:
    """List the spellings of the folder in which Gradio keeps uploads."""
    named = os.environ.get("GRADIO_TEMP_DIR") or Path(tempfile.gettempdir()) / "gradio"
    return list(dict.fromkeys([Path(named), Path(named).resolve()]))


def _connect(event: Callable[..., Any], act: Callable[..., Any], *fields: Any, **settings: Any) -> Any:
    """Let an event call an action; its errors are told, and those of earlier attempts go."""
    return event(_tell_errors(act), *fields, js=_CLOSE_MESSAGES, **settings)


def _take_dropped(files: Any, act: Callable[..., Any], *fields: Any, **settings: Any) -> None:
    """Let a drop zone call an action, and empty it afterwards: a zone that holds a file takes no other."""
    dropped = _connect(files.upload, act, *fields, show_progress_on=files, **settings)
    for after in (dropped.success, dropped.failure):
        after(lambda: None, None, [files], api_visibility="private", show_progress="hidden")


def _show_on(progress: Any) -> Listener:
    """Make a listener that shows bars on the page, with the seconds that the rest of each will take.

    Args:
        progress: Gradio's progress of a call.
    """
    begun: dict[str, float] = {}

    def tell(description: str, done: int, total: int) -> None:
        now = time.monotonic()
        seconds = now - begun.setdefault(description, now)
        left = f", about {seconds / done * (total - done):.0f} s left" if done and seconds > 1 else ""
        progress((done, total), desc=f"{description}{left}")

    return tell


class _DrawTab:
    """The tab with concepts, canvas, settings and results."""

    def __init__(self, gradio: Any, studio: Studio, borrow: Borrow) -> None:
        self.gradio, self.studio, self.session = gradio, studio, gradio.State(None)
        self.width, self.height = actions.own_pixels(studio)
        with gradio.Row():
            with gradio.Column(scale=3):
                self._add_concepts()
                self.canvas = canvas.make_component(canvas.make_empty(self.width, self.height))
            with gradio.Column(scale=2):
                self._add_wishes()
                self._add_results()
        self.shown = [self.session, self.loaded, self.unloading, self.which, self.canvas]
        self._connect(borrow)

    def _add_concepts(self) -> None:
        gradio = self.gradio
        with gradio.Accordion("Concepts", open=True):
            with gradio.Row():
                named = "Hub id, folder or file" if self.studio.local else "Hub id"
                self.source = gradio.Textbox(label=named, placeholder="user/edlora-potter", scale=3)
                self.load = gradio.Button("Load", scale=1)
            self.files = gradio.File(
                label="Or drop files", file_count="multiple", file_types=_ENDINGS, height=110, elem_classes="zone"
            )
            self.loaded = gradio.Dataframe(
                headers=["pack", "concept", "class word", "base"],
                datatype="str",
                interactive=False,
                label="Loaded",
                visible=False,
            )
            with gradio.Row(visible=False) as self.unloading:
                self.which = gradio.Dropdown([], label="Unload", scale=3)
                self.unload = gradio.Button("Unload", scale=1)

    def _add_wishes(self) -> None:
        gradio, usual = self.gradio, actions.Wishes
        self.prompt = gradio.Textbox(label="Global prompt", placeholder=_EXAMPLE, lines=2)
        self.negative = gradio.Textbox(label="What to avoid", lines=1)
        with gradio.Row():  # of columns, since boxes in a row alone shrink instead of going to a second line
            self.draft = self._add_switch(usual.draft, "Draft", "Draw each region alone first")
            self.refine = self._add_switch(usual.refine, "Refine", "Draw each anew, larger, so that none is lost")
            self.isolation = self._add_switch(usual.isolation, "Isolation", "Keep regions apart")
            follows = has_layout_condition(self.studio.base_name)
            self.condition = self._add_switch(
                False, "Layout condition", "Tell the base where things stand", elem_id="condition", visible=follows
            )
        with gradio.Row():  # without limits: the actions check them, and their errors name the field
            self.seed = gradio.Number(usual.seed, label="Seed", min_width=90)
            self.steps = gradio.Number(usual.steps, label="Steps", min_width=90)
            self.guidance = gradio.Number(usual_guidance(self.studio.base_name), label="Guidance", min_width=90)
        self.draw = gradio.Button("Draw", variant="primary", elem_id="draw")

    def _add_switch(self, on: bool, label: str, info: str, *, visible: bool = True, elem_id: str | None = None) -> Any:
        with self.gradio.Column(min_width=140, visible=visible):
            return self.gradio.Checkbox(on, label=label, info=info, elem_id=elem_id)

    def _add_results(self) -> None:
        gradio = self.gradio
        small = ["small"] if min(self.width, self.height) < _SMALL else []
        looks = {"interactive": False, "buttons": ["download", "fullscreen"]}
        self.picture = gradio.Image(label="Picture", type="filepath", elem_id="picture", elem_classes=small, **looks)
        self.overlay = gradio.Image(label="With its layout", format="png", elem_id="overlay", **looks)
        with gradio.Row():
            self.png = gradio.DownloadButton("Picture with its settings (PNG)", interactive=False, elem_id="png")
            self.save = gradio.Button("Layout (JSON)", elem_id="save-layout")
            self.layout = gradio.DownloadButton(visible=False)  # holds the file that the button before it hands out
            self.followed = gradio.DownloadButton("Layout condition (PNG)", visible=False)
        self.saved = gradio.UploadButton(
            "Load a layout (JSON) or a picture with its settings (PNG)", file_types=[".json", ".png", ".jpg", ".webp"]
        )

    def _connect(self, borrow: Borrow) -> None:
        """Connect buttons and fields with actions.

        Without ``show_progress_on``, Gradio would mark every result of a call that fails as wrong, also the canvas. A
        mark covers its part of the page: never a field in which the user corrects what was wrong.
        """
        typed, dropped = [self.session, self.source], [self.session, self.files]
        load = {"show_progress_on": self.files, **_ONE_BY_ONE}
        _connect(self.load.click, self._load, typed, self.shown, api_name="load", **load)
        _connect(self.source.submit, self._load, typed, self.shown, api_visibility="private", **load)
        _take_dropped(self.files, self._load_files, dropped, self.shown, api_name="load_files", **_ONE_BY_ONE)
        unload = [self.session, self.which]
        _connect(self.unload.click, self._unload, unload, self.shown, api_name="unload", show_progress_on=self.which)
        numbers, switches = (
            [self.seed, self.steps, self.guidance],
            [self.draft, self.refine, self.isolation, self.condition],
        )
        wishes = [self.prompt, self.negative, *numbers, *switches]  # in the order of _WISHES
        _connect(
            self.draw.click,
            borrow(self._draw),
            [self.session, self.canvas, *wishes],
            [self.picture, self.overlay, self.png, self.followed],
            api_name="draw",
            show_progress_on=self.picture,
            **_ONE_BY_ONE,
        )
        saved = _connect(
            self.save.click,
            self._save,
            [self.canvas, self.prompt, self.negative],
            [self.layout],
            api_name="save_layout",
            show_progress_on=self.save,
        )
        saved.success(None, [self.layout], None, js=_HAND_OUT, api_visibility="private")
        _connect(
            self.saved.upload,
            self._read,
            [self.saved],
            [self.canvas, *wishes],
            api_name="read_layout",
            show_progress_on=self.saved,
        )

    def offer(self, fused: Any, tabs: Any) -> None:
        """Add a button that loads a fused pack into this tab and shows the tab.

        Args:
            fused: The component with the pack's files; the button appears when it has some.
            tabs: All tabs of the page.
        """
        button = self.gradio.Button("Draw with it", visible=False, elem_id="draw-with-it")
        fused.change(
            lambda files: self.gradio.Button(visible=bool(files)),
            [fused],
            [button],
            api_visibility="private",
            show_progress="hidden",
        )
        _connect(
            button.click,
            self._load_fused,
            [self.session, fused],
            [*self.shown, tabs],
            api_name="load_fused",
            show_progress_on=fused,
            **_ONE_BY_ONE,
        )

    def _show(self, session: Session) -> tuple[Any, ...]:
        names = [concept.placeholder for concept in session.concepts]
        choices = self.gradio.Dropdown(choices=list(session.packs), value=next(iter(session.packs), None))
        some = bool(session.packs)
        table = self.gradio.Dataframe(actions.list_loaded(session), visible=some)
        return session, table, self.gradio.Row(visible=some), choices, canvas.update_concepts(names)

    def _load(self, session: Session | None, typed: str) -> tuple[Any, ...]:
        return self._show(actions.load(self.studio, session or Session(), typed.strip()))

    def _load_files(self, session: Session | None, sent: Sequence[str] | None) -> tuple[Any, ...]:
        files = [Path(each) for each in sent or ()]
        loaded, refused = actions.load_files(self.studio, session or Session(), files)
        for message in refused:
            _warn(message)
        return self._show(loaded)

    def _load_fused(self, session: Session | None, files: Sequence[str] | None) -> tuple[Any, ...]:
        fused = actions.load_fused(self.studio, session or Session(), [Path(each) for each in files or ()])
        return *self._show(fused), self.gradio.Tabs(selected=_DRAW)

    def _unload(self, session: Session | None, name: str | None) -> tuple[Any, ...]:
        return self._show((session or Session()).without_pack(name or ""))

    def _draw(self, session: Session | None, drawn: object, *fields: Any) -> tuple[Any, ...]:
        wishes = actions.Wishes.from_fields(**dict(zip(_WISHES, fields, strict=True)))
        result = actions.draw_picture(self.studio, session or Session(), drawn, wishes)
        picture, seen = str(result.picture), result.condition
        png = self.gradio.DownloadButton(value=picture, interactive=True)
        followed = self.gradio.DownloadButton(value=seen and str(seen), visible=seen is not None)
        return picture, result.overlay, png, followed

    def _save(self, drawn: object, prompt: str | None, negative: str | None) -> str:
        return str(actions.save_layout(self.studio, drawn, prompt or "", negative or ""))

    def _read(self, sent: str) -> tuple[Any, ...]:
        read = actions.read_layout_file(Path(sent), self.width, self.height)
        if read.needs:
            self.gradio.Info(_as_text(f"Drawn with {', '.join(read.needs)}; load what is missing."))
        unchanged = self.gradio.skip()
        told = {"prompt": read.prompt, "negative_prompt": read.negative_prompt, **read.settings}
        return read.canvas, *(told.get(name, unchanged) for name in _WISHES)


def _list_sources(files: Sequence[str] | None, named: str) -> list[str | Path]:
    """List the uploaded files, and the lines that were typed."""
    return [*(Path(each) for each in files or ()), *(line.strip() for line in named.splitlines() if line.strip())]


def _offer_loaded(gradio: Any, session: Any, tab: Any, files: Any) -> Any:
    """Add a field that offers what is loaded for drawing, anew whenever its tab is opened; returns it."""
    offered = gradio.CheckboxGroup([], label="Loaded in the tab Draw", visible=False)

    def list_loaded(session: Session | None, chosen: Sequence[str] | None) -> Any:
        names = actions.list_fusable(session or Session())
        return gradio.CheckboxGroup(
            choices=names, value=[name for name in chosen or () if name in names], visible=bool(names)
        )

    shown = {"show_progress": "hidden", "show_progress_on": files}
    _connect(tab.select, list_loaded, [session, offered], [offered], api_name="list_loaded", **shown)
    return offered


def _add_fuse_tab(gradio: Any, studio: Studio, borrow: Borrow, session: Any, tab: Any) -> Any:
    """Add the fields and results of fusing; returns the component with the fused pack's files.

    Args:
        gradio: The module.
        studio: The state that all users share.
        borrow: See `build_page`.
        session: The component with what the user has loaded for drawing.
        tab: The tab that is filled.
    """
    gradio.Markdown("Several concepts, or plain LoRAs, become one file. No photos are needed.")
    files = gradio.File(label="Drop files", file_count="multiple", file_types=_ENDINGS)
    loaded = _offer_loaded(gradio, session, tab, files)
    contents = gradio.Textbox(label="In these files", interactive=False, visible=False)
    more = "Hub ids, folders or files, a line each" if studio.local else "Hub ids, a line each"
    named = gradio.Textbox(label=more, lines=2)
    prompts = gradio.Textbox(
        label="Prompts with the trigger words of plain LoRAs whose files do not tell them, a line each", lines=2
    )
    method = gradio.Dropdown(list(actions.METHODS), value=actions.METHODS[0], label="Method", info=_WHICH_METHOD)
    go = gradio.Button("Fuse", variant="primary")
    table = gradio.Dataframe(label=TITLE, interactive=False, datatype="str")
    meaning = gradio.Textbox(label="What the numbers mean", interactive=False, lines=2)
    result = gradio.File(label="The fused pack", file_count="multiple", interactive=False)

    def tell_contents(sent: Sequence[str] | None) -> Any:
        told = actions.tell_contents(studio, [Path(each) for each in sent or ()])
        return gradio.Textbox(told, lines=len(sent or ()) or 1, visible=bool(sent))

    shown = {"show_progress": "hidden", "show_progress_on": files}
    _connect(files.change, tell_contents, [files], [contents], api_name="tell_contents", **shown)

    progress = gradio.Progress()  # as a default, Gradio replaces it in each call by that call's own

    def fuse(
        sent: Sequence[str] | None,
        typed: str,
        method: str,
        triggers: str,
        session: Session | None,
        chosen: Sequence[str],
        shown: Any = progress,
    ) -> tuple[Any, ...]:
        sources = [*_list_sources(sent, typed), *actions.take_loaded(session or Session(), chosen)]
        lines = [line.strip() for line in triggers.splitlines() if line.strip()]
        with listen(_show_on(shown)):
            paths, (headers, rows), meaning = actions.fuse(studio, sources, method, lines)
        return {"headers": headers, "data": rows}, meaning, [str(path) for path in paths]

    _connect(
        go.click,
        borrow(fuse),
        [files, named, method, prompts, session, loaded],
        [table, meaning, result],
        api_name="fuse",
        show_progress_on=table,
        **_ONE_BY_ONE,
    )
    return result


def _add_file_tab(gradio: Any, studio: Studio) -> None:
    file = gradio.File(label="Drop a file", file_types=_ENDINGS, elem_classes="zone")
    with gradio.Row():
        named = gradio.Textbox(label="Or a Hub id, folder or file" if studio.local else "Or a Hub id", scale=3)
        go = gradio.Button("Look", scale=1)
    facts = gradio.Dataframe(headers=["what", "value"], datatype="str", interactive=False, label="Facts", wrap=True)
    concepts = gradio.Dataframe(
        headers=["concept", "class word", "kind", "tokens (mean norm)"],
        datatype="str",
        interactive=False,
        label="Concepts",
        wrap=True,
    )
    notes = gradio.Textbox(label="Notes and problems", interactive=False, lines=1)
    card = gradio.Markdown(label="Card", elem_id="card")

    def look(source: str | Path) -> tuple[Any, ...]:
        found = actions.describe(studio, source)
        return found.facts, found.concepts, "\n".join(found.notes) or "none", found.card

    shown = [facts, concepts, notes, card]
    _take_dropped(file, lambda sent: look(Path(sent)), [file], shown, api_name="look_into_file")
    _connect(go.click, lambda typed: look(typed.strip()), [named], shown, api_name="look", show_progress_on=facts)
