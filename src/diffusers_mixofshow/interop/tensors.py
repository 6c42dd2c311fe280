"""Read tensors from other programs' files: safetensors, and pickles of only tensors and plain values."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from diffusers_mixofshow.edlora.defects import DTYPES, list_names
from diffusers_mixofshow.edlora.reading import check_file, read_tensors, suggest_name
from diffusers_mixofshow.edlora.signatures import guess_kind
from diffusers_mixofshow.errors import EDLoRAFormatError, EDLoRANotFoundError, first_line


PICKLES = (".pth", ".pt", ".bin", ".ckpt")
"""Extensions of files written by PyTorch."""
_OF_PYTORCH = ("a zip archive", "an old pickle")
"""Kinds that `guess_kind` gives for files of PyTorch; an error in reading them has another reason than the kind."""


def load_safetensors(path: Path) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    """Read the metadata and tensors of a safetensors file.

    Raises:
        EDLoRANotFoundError: If there is no such file.
        EDLoRAFormatError: If it is not a safetensors file.
    """
    try:
        metadata, tensors = read_tensors(path)
    except EDLoRANotFoundError as error:
        raise _not_found_error(path) from error
    _refuse_packed(path, tensors.items())
    return metadata, tensors


def load_pickle(path: Path) -> Any:
    """Read a file of PyTorch with ``weights_only=True``, so that no code in it is executed.

    Returns:
        Dicts and lists of tensors, numbers and strings. No tensor is larger than the file.

    Raises:
        EDLoRANotFoundError: If there is no such file.
        EDLoRAFormatError: If it cannot be read safely.
    """
    try:
        size = check_file(path)
    except EDLoRANotFoundError as error:
        raise _not_found_error(path) from error
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged or hostile pickle makes the unpickler raise anything
        if (kind := guess_kind(path)) and not kind.startswith(_OF_PYTORCH):
            raise EDLoRAFormatError(f"{path} cannot be read as a file of PyTorch: it is {kind}.") from error
        raise EDLoRAFormatError(
            f"{path} cannot be read with weights_only=True ({_short(error)}). It is damaged, or holds Python objects "
            "beside tensors, which are never loaded; ask for it as safetensors."
        ) from error
    tensors = _tensors(content)
    _refuse_packed(path, tensors)
    if swollen := [name for name, tensor in tensors if not _is_plain(tensor, size)]:
        raise EDLoRAFormatError(
            f"{path}: tensors that are sparse, quantised or larger than the file itself: {list_names(swollen)}. "
            "Ask for it as safetensors."
        )
    return content


def to_working_dtype(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor in a dtype that supports arithmetic; 8-bit floats become float32, exactly."""
    return tensor.float() if tensor.is_floating_point() and tensor.dtype not in DTYPES else tensor


def _refuse_packed(path: Path, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Refuse 4-bit floats, two to a byte, which torch cannot convert; older versions of torch cannot read them."""
    if packed := [name for name, tensor in tensors if str(tensor.dtype).startswith("torch.float4")]:
        raise EDLoRAFormatError(
            f"{path}: tensors of packed 4-bit floats: {list_names(packed)}. Expected 8-bit floats or wider; ask for "
            "it in float16."
        )


def _is_plain(tensor: torch.Tensor, size: int) -> bool:
    dense = tensor.layout is torch.strided and not tensor.is_quantized and tensor.device.type == "cpu"
    return dense and tensor.numel() * tensor.element_size() <= size


def _tensors(value: Any, name: str = "") -> list[tuple[str, torch.Tensor]]:
    """Every tensor in nested dicts and lists, with its path."""
    found, waiting = [], [(name, value)]
    seen: set[int] = set()
    while waiting:
        name, value = waiting.pop()
        if isinstance(value, torch.Tensor):
            found.append((name or "the only one", value))
        elif isinstance(value, Mapping | list | tuple) and id(value) not in seen:
            seen.add(id(value))
            items = value.items() if isinstance(value, Mapping) else enumerate(value)
            waiting += [(f"{name}.{key}".removeprefix("."), one) for key, one in items]
    return found


def _not_found_error(path: Path) -> EDLoRANotFoundError:
    return EDLoRANotFoundError(
        f"{path} does not exist. Give a file of a LoRA, an ED-LoRA or textual inversion.{suggest_name(path)}"
    )


def _short(error: Exception) -> str:
    return first_line(error)[:160].rstrip(".")
