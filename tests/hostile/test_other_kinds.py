"""Files of well-known kinds that are given as LoRAs: the error says what they seem to be and what to do."""

from __future__ import annotations

import io
import zipfile

import pytest
import torch
from PIL import Image
from safetensors.torch import save

from diffusers_mixofshow.edlora import EDLoRA
from diffusers_mixofshow.errors import EDLoRAFormatError
from diffusers_mixofshow.interop.foreign import read_foreign


def picture(kind):
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(buffer, kind)
    return buffer.getvalue()


def archive():
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("lora.safetensors", "x" * 100)
    return buffer.getvalue()


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12345\n"
KINDS = {
    "PNG": (picture("PNG"), "PNG picture"),
    "JPEG": (picture("JPEG"), "JPEG picture"),
    "GIF": (picture("GIF"), "GIF picture"),
    "BMP": (picture("BMP"), "BMP picture"),
    "TIFF": (picture("TIFF"), "TIFF picture"),
    "WebP": (picture("WEBP"), "WebP picture"),
    "PDF": (b"%PDF-1.7\n" + b"x" * 100, "PDF document"),
    "zip": (archive(), "zip archive"),
    "gzip": (b"\x1f\x8b\x08" + b"x" * 100, "gzip archive"),
    "page": (b"\n<!DOCTYPE html>\n<html><body>Log in</body></html>", "web page.*download the file itself"),
    "JSON": (b'{"error": "Repository not found"}', "JSON"),
    "pointer": (POINTER, "Git LFS pointer.*git lfs pull"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["edlora.safetensors", "lora.safetensors", "model.pth"])
def test_what_a_file_seems_to_be_is_said(tmp_path, kind, name):
    content, told = KINDS[kind]
    if kind == "zip" and name.endswith(".pth"):
        told = "damaged"  # PyTorch's own files are zip archives
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(EDLoRAFormatError, match=told):
        read_foreign(path)
    if name.endswith(".safetensors"):
        with pytest.raises(EDLoRAFormatError, match=told):
            EDLoRA.from_pretrained(path)


def test_safetensors_under_another_name(tmp_path):
    path = tmp_path / "lora.pt"
    path.write_bytes(save({"x": torch.zeros(4, 4)}))
    with pytest.raises(EDLoRAFormatError, match=r"name it \.safetensors"):
        read_foreign(path)


def test_what_pytorch_wrote_under_the_name_of_safetensors(tmp_path):
    path = tmp_path / "lora.safetensors"
    torch.save({"x": torch.zeros(4, 4)}, path)
    with pytest.raises(EDLoRAFormatError, match="a file of PyTorch"):
        read_foreign(path)
