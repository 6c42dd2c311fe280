"""Recognise files of other kinds by their first bytes, for error messages."""

from __future__ import annotations

from pathlib import Path


_LONGEST = 512
"""Number of bytes that are read."""

_SIGNATURES = (
    (b"\x89PNG\r\n\x1a\n", "a PNG picture"),
    (b"\xff\xd8\xff", "a JPEG picture"),
    (b"GIF8", "a GIF picture"),
    (b"RIFF", "a WebP picture, sound or film (RIFF)"),
    (b"BM", "a BMP picture"),
    (b"II*\0", "a TIFF picture"),
    (b"MM\0*", "a TIFF picture"),
    (b"%PDF-", "a PDF document"),
    (b"PK\x03\x04", "a zip archive, or a file of PyTorch (.pth, .pt, .bin)"),
    (b"\x80\x02", "an old pickle of PyTorch (.pth, .pt, .bin, .ckpt)"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive"),
    (b"Rar!", "a RAR archive"),
    (b"GGUF", "a GGUF model"),
)
_POINTER = b"version https://git-lfs.github.com/spec/"
_SAFETENSORS = ".safetensors"
_PAGE = (b"<!doctype html", b"<html")
_JSON = (b"{", b"[")


def guess_kind(path: Path) -> str:
    """Kind of a file with a remedy, to complete "it is ..."; empty if unknown."""
    with path.open("rb") as file:
        start = file.read(_LONGEST)
    if start.startswith(_POINTER):
        return (
            "a Git LFS pointer instead of the file: run `git lfs pull` in its folder, or fetch it with `hf download`"
        )
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip()
    if text.lower().startswith(_PAGE):
        return "a web page (HTML), such as the page about a file or a login page: download the file itself"
    if kind := next((kind for signature, kind in _SIGNATURES if start.startswith(signature)), ""):
        return f"{kind} by its first bytes, whatever its name says"
    if text.startswith(_JSON):
        return "a text, JSON by its first bytes"
    if start[8:9] == b"{" and path.suffix != _SAFETENSORS:
        return f"a safetensors file by its first bytes, whatever its name says: name it {_SAFETENSORS}"
    return ""
