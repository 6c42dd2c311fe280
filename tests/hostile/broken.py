"""Files that no honest program writes: one sound ED-LoRA file and every way to break it that we know of."""

from __future__ import annotations

import copy
import json
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

import packs
import tiny


FILE = "edlora.safetensors"
MIB = 2**20
ESCAPE = "\x1b[2J\x1b]0;owned\x07"


@dataclass
class Sound:
    """A valid file in its parts: the header of safetensors, the JSON of ours in it, and the data."""

    header: dict[str, Any]
    ours: dict[str, Any]
    data: bytes
    raw: bytes = field(repr=False)

    @classmethod
    def of(cls, path: Path) -> Sound:
        raw = path.read_bytes()
        length = int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8 : 8 + length])
        return cls(header, json.loads(header["__metadata__"]["edlora"]), raw[8 + length :], raw)

    def names(self, part: str) -> list[str]:
        return sorted(name for name in self.header if part in name)

    @property
    def text_length(self) -> int:
        return int.from_bytes(self.raw[:8], "little")


def make(folder: Path) -> Sound:
    """A sound file of one concept on the tiny model."""
    return Sound.of(packs.random_pack(tiny.components()).save_pretrained(folder / "sound"))


def content(header: Any, data: bytes, *, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


Break = Callable[[Sound, Path], "bytes | None"]
"""Returns the file's bytes; or makes whatever shall stand in its place itself, and returns None."""


@dataclass(frozen=True)
class Case:
    name: str
    break_it: Break
    says: str = ""
    root_may: bool = False

    def put(self, sound: Sound, folder: Path) -> Path:
        """The broken file, under the name that is looked for in a folder."""
        path = folder / FILE
        made = self.break_it(copy.deepcopy(sound), path)
        if made is not None:
            path.write_bytes(made)
        return path


def raw(change: Callable[[Sound], bytes]) -> Break:
    return lambda sound, _: change(sound)


def entries(change: Callable[[dict[str, Any], Sound], None]) -> Break:
    """Break the header of safetensors."""

    def break_it(sound: Sound, _: Path) -> bytes:
        change(sound.header, sound)
        return content(sound.header, sound.data)

    return break_it


def ours(change: Callable[[dict[str, Any]], Any]) -> Break:
    """Break our JSON; the change may also return the text that shall stand there."""

    def break_it(sound: Sound, _: Path) -> bytes:
        made = change(sound.ours)
        text = made if isinstance(made, str) else json.dumps(sound.ours)
        sound.header["__metadata__"]["edlora"] = text
        return content(sound.header, sound.data)

    return break_it


def setting(*path: Any, value: Any) -> Break:
    def change(header: dict[str, Any]) -> None:
        for key in path[:-1]:
            header = header[key]
        header[path[-1]] = value

    return ours(change)


def concept(**values: Any) -> Break:
    return ours(lambda header: header["concepts"][0].update(values))


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Break:
    """Break tensors and write them anew with the header's words unchanged."""

    def break_it(sound: Sound, path: Path) -> None:
        from safetensors.torch import save_file

        path.write_bytes(sound.raw)
        held = {name: tensor.clone() for name, tensor in load_file(path).items()}
        change(held)
        save_file(held, path, metadata=sound.header["__metadata__"])

    return break_it


def first(held: dict[str, Any], part: str) -> str:
    return sorted(name for name in held if part in name)[0]


def filled(part: str, value: float) -> Break:
    return tensors(lambda held: held[first(held, part)].view(-1)[3:4].fill_(value))


def replaced(part: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Break:
    def swap(held: dict[str, torch.Tensor]) -> None:
        name = first(held, part)
        held[name] = change(held[name]).contiguous()

    return tensors(swap)


def dropped(part: str) -> Break:
    return tensors(lambda held: held.pop(first(held, part)))


def added(name: str, *shape: int) -> Break:
    return tensors(lambda held: held.update({name: torch.zeros(*shape)}))


def renamed(part: str, name: str) -> Break:
    return tensors(lambda held: held.update({name: held.pop(first(held, part))}))


def offsets(begin: int, end: int) -> Break:
    """Shift where the second tensor's data begins and ends."""

    def change(header: dict[str, Any], sound: Sound) -> None:
        entry = header[sound.names("lora_B")[1]]
        old = entry["data_offsets"]
        entry["data_offsets"] = [old[0] + begin, old[1] + end]

    return entries(change)


def entry(**values: Any) -> Break:
    return entries(lambda header, sound: header[sound.names("lora_B")[0]].update(values))


def sparse(size: int, *, announced: bool = False) -> Break:
    """A file of holes, which claims to be full of numbers."""

    def break_it(sound: Sound, path: Path) -> None:
        name = sound.names("lora_A")[0] if announced else "unet.other.lora_A.weight"
        header = {
            "__metadata__": sound.header["__metadata__"],
            name: {"dtype": "F32", "shape": [4, size // 16], "data_offsets": [0, size // 16 * 16]},
        }
        text = json.dumps(header).encode()
        with path.open("wb") as file:
            file.write(content(text, b""))
            file.truncate(8 + len(text) + size // 16 * 16)

    return break_it


def header_of_holes(length: int) -> Break:
    def break_it(_: Sound, path: Path) -> None:
        with path.open("wb") as file:
            file.write(length.to_bytes(8, "little"))
            file.truncate(8 + length)

    return break_it


def many_tensors(sound: Sound, _: Path) -> bytes:
    empty = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    names = {f"t{number}": empty for number in range(30_000)}
    return content({"__metadata__": sound.header["__metadata__"], **names}, b"")


class _Attack:
    """Unpickled, it would make a folder."""

    def __init__(self, marker: str) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.marker,)


def attacking_pickle(_: Sound, path: Path) -> None:
    torch.save({"edlora": _Attack(str(path.parent / "attacked"))}, path)


def linked(to: str) -> Break:
    def break_it(sound: Sound, path: Path) -> None:
        outside = path.parent.parent / "outside.safetensors"
        outside.write_bytes(sound.raw)
        path.symlink_to({"outside": outside, "itself": path, "nothing": path.with_name("nothing")}[to])

    return break_it


def bound_socket(_: Sound, path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # a socket's path has at most 108 characters
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.chdir(here)


def unreadable(sound: Sound, path: Path) -> None:
    path.write_bytes(sound.raw)
    path.chmod(0)


def twice(header: dict[str, Any]) -> None:
    header["concepts"] *= 2


def with_shared_token(header: dict[str, Any]) -> None:
    header["concepts"].append({**header["concepts"][0], "placeholder": "<tom>"})


CASES = [
    # The bytes.
    Case("empty", raw(lambda s: b""), "0 bytes"),
    Case("one byte", raw(lambda s: s.raw[:1])),
    Case("cut in the length", raw(lambda s: s.raw[:7])),
    Case("cut after the length", raw(lambda s: s.raw[:8]), "the whole file has 8"),
    Case("cut in the header", raw(lambda s: s.raw[: s.text_length // 2])),
    Case("cut after the header", raw(lambda s: s.raw[: 8 + s.text_length])),
    Case("cut in the data", raw(lambda s: s.raw[: -len(s.data) // 2])),
    Case("last byte gone", raw(lambda s: s.raw[:-1])),
    Case("one byte too many", raw(lambda s: s.raw + b"\0")),
    Case("header length 0", raw(lambda s: content(b"{}", s.data, length=0))),
    Case("header length too small", raw(lambda s: content(s.header, s.data, length=40))),
    Case("header length 2^64 - 1", raw(lambda s: b"\xff" * 8 + s.raw[8:]), "header would have"),
    Case("header length 100 MB", raw(lambda s: content(s.header, s.data, length=100_000_000)), "header would have"),
    Case("header of 64 MiB holes", header_of_holes(64 * MIB), "header would have"),
    Case("a picture", raw(lambda s: b"\x89PNG\r\n\x1a\n" + bytes(100))),
    Case("a zip", raw(lambda s: b"PK\x03\x04" + bytes(100))),
    Case("text", raw(lambda s: b"<!doctype html><title>404: not found</title>")),
    Case("a git LFS pointer", raw(lambda s: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")),
    Case("a pickle that attacks", attacking_pickle),
    # The header of safetensors.
    Case("header no JSON", raw(lambda s: content(b"{nonsense}", s.data))),
    Case("header a list", raw(lambda s: content(b"[1, 2]", s.data))),
    Case("header not UTF-8", raw(lambda s: content(b'{"\xff\xfe": 1}', s.data))),
    Case("header nested deeply", raw(lambda s: content(b'{"a":' * 200_000, s.data))),
    Case("header with NULs", raw(lambda s: content(bytes(100), s.data))),
    Case("header of spaces", raw(lambda s: content(b" " * MIB, s.data))),
    Case("metadata no strings", entries(lambda h, s: h.update(__metadata__={"edlora": {"a": 1}}))),
    Case("overlapping tensors", offsets(-8, -8)),
    Case("a gap between tensors", offsets(4, 4)),
    Case("offsets in reverse", offsets(64, -64)),
    Case("offsets beyond the end", offsets(0, 10**9)),
    Case("offset negative", entry(data_offsets=[-4, 4])),
    Case("offset above 2^64", entry(data_offsets=[0, 2**70])),
    Case("shape overflows", entry(shape=[2**40, 2**40])),
    Case("shape negative", entry(shape=[-1, 4])),
    Case("shape of other size", entry(shape=[1, 1])),
    Case("shape no list", entry(shape="big")),
    Case("dtype unknown", entry(dtype="F99")),
    Case("dtype of other size", entry(dtype="F64")),
    Case("30,000 tensors", many_tensors, "30,000 tensors"),
    Case("3 GB of holes", sparse(3 * 2**30), "unexpected|layers that its header does not name"),
    Case("3 GB of holes, announced", sparse(3 * 2**30, announced=True), "not a pair|missing tensors"),
    Case("20 GB of holes", sparse(20 * 2**30), "more than any LoRA"),
    # Our header.
    Case("no header of ours", entries(lambda h, s: h.update(__metadata__={"format": "pt"})), "no 'edlora' header"),
    Case("ours empty", ours(lambda h: ""), "not a JSON object"),
    Case("ours a list", ours(lambda h: "[]"), "not a JSON object"),
    Case("ours nested deeply", ours(lambda h: "[" * 100_000), "not a JSON object"),
    Case("ours of 4 MiB small lists", ours(lambda h: '{"x":[' + "[]," * (MIB * 4 // 3 - 20) + "[]]}")),
    Case("ours of 5 MiB", ours(lambda h: json.dumps({**h, "x": "x" * (5 * MIB)})), "not a JSON object"),
    Case("a number of 5,000 digits", ours(lambda h: '{"format_version": ' + "9" * 5000 + "}")),
    Case("a newer version", setting("format_version", value=3), "format version 3, this release reads 1 to 2"),
    Case("version 0", setting("format_version", value=0), "format version 0"),
    Case("version a string", setting("format_version", value="1"), "format version '1'"),
    Case("no version", ours(lambda h: h.pop("format_version") and None), "format version None"),
    Case("base model a number", setting("base_model", value=7), "'base_model' must be"),
    Case("base model of 10,000 characters", setting("base_model", value="m" * 10_000), "'base_model' must be"),
    Case("base model with controls", setting("base_model", value=ESCAPE), "'base_model' must be"),
    Case("layers a string", setting("layers", value="all"), "'layers' must be"),
    Case("no layers", setting("layers", value=[]), "no cross-attention layers"),
    Case("a layer twice", ours(lambda h: h["layers"].__setitem__(1, h["layers"][0])), "twice"),
    Case("training a list", setting("training", value=[]), "'training' must be"),
    Case("ranks missing", setting("lora", value={"unet.x": {}}), "'lora' must be"),
    Case("rank 0", ours(lambda h: next(iter(h["lora"].values())).update(rank=0))),
    Case("rank negative", ours(lambda h: next(iter(h["lora"].values())).update(rank=-4))),
    Case("rank 10^400", ours(lambda h: next(iter(h["lora"].values())).update(rank=10**400))),
    Case("rank of another file", ours(lambda h: next(iter(h["lora"].values())).update(rank=8)), "ranks differ"),
    Case("alpha Inf", ours(lambda h: json.dumps(h).replace('"alpha": 4.0', '"alpha": 1e999', 1)), "'lora' must be"),
    # Concepts.
    Case("no concept", setting("concepts", value=[]), "no concept"),
    Case("concept twice", ours(twice), "used twice"),
    Case("token of two concepts", ours(with_shared_token), "used twice"),
    Case("name an ordinary word", concept(placeholder="dog"), "not of the form <name>"),
    Case("token an ordinary word", concept(tokens=["the", "dog"]), "not of the form <name>"),
    Case("token a special token", concept(tokens=["<|endoftext|>", "<rex2>"]), "not of the form <name>"),
    Case("name a path", concept(placeholder="<../../etc/passwd>"), "not of the form <name>"),
    Case("name with controls", concept(placeholder=f"<{ESCAPE}>"), "not of the form <name>"),
    Case("name of 10,000 characters", concept(placeholder="<" + "a" * 10_000 + ">"), "longer than 100"),
    Case("class word of 10,000 characters", concept(class_word="dog" * 3334), "longer than 100"),
    Case("class word with controls", concept(class_word=f"dog{ESCAPE}"), "control characters"),
    Case("class word that turns the text", concept(class_word="dog\u202egod"), "control characters"),
    Case("class word empty", concept(class_word=" "), "class word is empty"),
    Case("kind unknown", concept(kind="virus"), "not one of"),
    Case("1,000 tokens", concept(tokens=[f"<t{i}>" for i in range(1000)]), "missing embeddings"),
    # Tensors.
    Case("NaN in an embedding", filled("embeddings", float("nan")), "not finite"),
    Case("Inf in an update", filled("lora_A", float("inf")), "not finite"),
    Case("-Inf in an update", filled("lora_B", float("-inf")), "not finite"),
    Case("whole numbers", replaced("embeddings", lambda t: t.int()), "floating dtype"),
    Case("booleans", replaced("lora_A", lambda t: t > 0), "floating dtype"),
    Case("8-bit floats", replaced("lora_A", lambda t: t.to(torch.float8_e4m3fn)), "floating dtype"),
    Case("one row less", replaced("lora_A", lambda t: t[:-1]), "ranks differ"),
    Case("transposed down", replaced("lora_A", lambda t: t.T), "ranks differ"),
    Case("transposed up", replaced("lora_B", lambda t: t.T), "not a pair"),
    Case("transposed embedding", replaced("embeddings", lambda t: t.T), "embeddings not of shape"),
    Case("narrower embedding", replaced("embeddings", lambda t: t[:, :-1]), "differ in width"),
    Case("a scalar", replaced("lora_A", lambda t: t[0, 0]), "ranks differ"),
    Case("five dimensions", replaced("lora_A", lambda t: t[None, None, None]), "ranks differ"),
    Case("nothing in it", replaced("lora_A", lambda t: t[:0]), "ranks differ"),
    Case("wider than any layer", replaced("lora_A", lambda t: torch.zeros(4, 2**17 + 1)), "not a pair"),
    Case("a down matrix missing", dropped("lora_A"), "missing tensors: 1"),
    Case("an embedding missing", dropped("embeddings"), "missing embeddings: 1"),
    Case("all tensors missing", tensors(lambda held: held.clear()), "missing"),
    Case("one tensor too many", added("unet.surprise", 1), "unexpected tensors: 1"),
    Case("one pair too many", added("unet.surprise.lora_A.weight", 4, 4), "does not name"),
    Case("a stranger's embedding", added("edlora.embeddings.<tom>", 4, 32), "no concept has"),
    Case("layer of the VAE", added("vae.conv.lora_A.weight", 4, 4), "does not name"),
    Case("name of 10,000 characters in a tensor", renamed("lora_A", "t" * 10_000), "unexpected"),
    Case("controls in a tensor's name", renamed("lora_A", f"unet.{ESCAPE}"), r"\\x1b"),
    Case("a path as a tensor's name", renamed("lora_A", "../../etc/passwd"), "unexpected"),
    # The place.
    Case("nothing there", lambda s, path: None, "does not exist"),
    Case("a folder", lambda s, path: path.mkdir(), "a folder"),
    Case("a pipe", lambda s, path: os.mkfifo(path), "a pipe"),
    Case("a socket", bound_socket, "a pipe, socket"),
    Case("a device", lambda s, path: path.symlink_to("/dev/zero"), "symbolic link"),
    Case("a link out of the folder", linked("outside"), "symbolic link"),
    Case("a link to itself", linked("itself"), ""),
    Case("a link to nothing", linked("nothing"), "does not exist"),
    Case("no permission", unreadable, "ermission", root_may=True),
]
