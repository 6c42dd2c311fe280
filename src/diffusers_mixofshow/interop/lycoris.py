"""Convert LoHa, LoKr and full differences (LyCORIS, ComfyUI) to low-rank updates, exactly, where the rank is low.

| method | the weight's change | as ``up @ down`` |
|---|---|---|
| LoHa | ``(a b) * (c d)``, elementwise | products of columns of a with columns of c, and of rows of b with rows of d |
| LoKr | ``kron(a b, c d)`` | ``kron(a, c) @ kron(b, d)``; a full factor is paired with the identity |
| full | a matrix | singular vectors, if the remainder beyond some rank is within rounding |
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch

from diffusers_mixofshow.edlora.defects import WIDEST
from diffusers_mixofshow.interop.names import is_of_peft
from diffusers_mixofshow.interop.tensors import to_working_dtype


HIGHEST_RANK = 256
"""Highest rank of a converted update; others are refused."""
MOST_NUMBERS = 2**31
"""Limit for the values of all converted updates: a file of kilobytes could expand to gigabytes."""

_PART = re.compile(r"(?P<layer>.+)\.(?P<part>hada_w[12]_[ab]|lokr_w[12](_[ab])?|diff|diff_b|alpha)")
_DIFFERENCES = {"diff", "diff_b"}
_SPARE = 8
"""Extra random directions, beyond the highest rank, when probing a full difference."""
_ROUNDING = 4
"""Tolerance for a full difference: relative distance from low rank, in units of its dtype's machine epsilon."""
_FINEST = 1e-12
"""Smallest epsilon for that tolerance, for float64 differences: the computation itself is in float64."""

Factors = tuple[torch.Tensor, torch.Tensor, float]
"""up, down, and the scaling of their product."""


def is_part(name: str) -> bool:
    """Whether a tensor belongs to LoHa, LoKr or a full difference, by its name."""
    match = _PART.fullmatch(name)
    return match is not None and match["part"] != "alpha"


def list_products(tensors: Iterable[str]) -> set[str]:
    """Names of the layers with tensors of LoHa or LoKr."""
    matches = filter(None, map(_PART.fullmatch, tensors))
    return {match["layer"] for match in matches if match["part"].startswith(("hada", "lokr"))}


def convert_to_halves(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Replace LoHa, LoKr and full differences of low rank by halves of a LoRA.

    Other tensors stay, as do layers that also have tensors of another kind. Differences of 0 are dropped.
    """
    layers = _layers(tensors)
    parts = {f"{layer}.{part}" for layer, parts in layers.items() for part in parts}
    found = {name: tensor for name, tensor in tensors.items() if name not in parts}
    left = MOST_NUMBERS
    for layer, of_layer in layers.items():
        if of_layer.keys() <= _DIFFERENCES and not any(bool(tensor.any()) for tensor in of_layer.values()):
            continue
        if left < 0 or (factors := _factorise(of_layer)) is None:
            found |= {f"{layer}.{part}": tensor for part, tensor in of_layer.items()}
            continue
        up, down, scaling = factors
        left -= up.numel() + down.numel()
        found |= {f"{layer}.lora_down.weight": down, f"{layer}.lora_up.weight": up}
        found[f"{layer}.alpha"] = torch.tensor(scaling * down.shape[0], dtype=torch.float64)
    return found


def _layers(tensors: Mapping[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    """Layers all of whose tensors are parts of LoHa, LoKr or a full difference, to these tensors."""
    layers: dict[str, dict[str, torch.Tensor]] = {}
    others: set[str] = set()
    for name, tensor in tensors.items():
        if match := _PART.fullmatch(name):
            layers.setdefault(match["layer"], {})[match["part"]] = tensor
        else:
            owner = name.rpartition(".")[0]
            others |= {owner, owner.rpartition(".")[0]}
    return {
        layer: parts
        for layer, parts in layers.items()
        if parts.keys() != {"alpha"} and layer not in others and not is_of_peft(layer)
    }


def _factorise(parts: Mapping[str, torch.Tensor]) -> Factors | None:
    """Factors of a layer's update; None if its rank is not low or its tensors are not well-formed."""
    sound = all(tensor.is_floating_point() and tensor.numel() for tensor in parts.values())
    if not sound or ("alpha" in parts and parts["alpha"].numel() != 1):
        return None
    alpha = float(parts["alpha"]) if "alpha" in parts else None
    found = {part: _squeeze_convolution(to_working_dtype(tensor)) for part, tensor in parts.items() if part != "alpha"}
    if found.keys() <= _DIFFERENCES:
        bias = found.pop("diff_b", None)
        return _factorise_full(parts["diff"]) if "diff" in found and (bias is None or not bool(bias.any())) else None
    if any(factor.dim() != 2 for factor in found.values()):
        return None
    if all(part.startswith("hada") for part in found):
        return _factorise_loha(found, alpha)
    return _factorise_lokr(found, alpha) if all(part.startswith("lokr") for part in found) else None


def _factorise_loha(parts: Mapping[str, torch.Tensor], alpha: float | None) -> Factors | None:
    """Factors of an elementwise product of two low-rank matrices (Khatri-Rao products of their factors)."""
    if len(parts) != 4:
        return None
    a, b, c, d = (_widen(parts[f"hada_w{number}_{half}"]) for number in "12" for half in "ab")
    fits = a.shape[1] == b.shape[0] and c.shape[1] == d.shape[0] and a.shape[0] == c.shape[0]
    if not fits or b.shape[1] != d.shape[1] or not _is_low(a.shape[1] * c.shape[1], a.shape[0], b.shape[1]):
        return None
    up = (a[:, :, None] * c[:, None, :]).flatten(1)
    down = (b[:, None, :] * d[None, :, :]).flatten(0, 1)
    return up, down, 1.0 if alpha is None else alpha / b.shape[0]


def _factorise_lokr(parts: Mapping[str, torch.Tensor], alpha: float | None) -> Factors | None:
    """Factors of a Kronecker product of two matrices, each full or of low rank."""
    pairs = [_pair(parts, f"lokr_w{number}") for number in "12"]
    first, second = pairs
    if first is None or second is None:
        return None
    rank = first[0].shape[1] * second[0].shape[1]
    out, width = first[0].shape[0] * second[0].shape[0], first[1].shape[1] * second[1].shape[1]
    if not _is_low(rank, out, width):
        return None
    taken_apart = [parts[name].shape[0] for name in ("lokr_w2_b", "lokr_w1_b") if name in parts]
    scaling = alpha / taken_apart[0] if alpha is not None and taken_apart else 1.0
    return torch.kron(first[0], second[0]), torch.kron(first[1], second[1]), scaling


def _pair(parts: Mapping[str, torch.Tensor], name: str) -> tuple[torch.Tensor, torch.Tensor] | None:
    """A factor of LoKr as a product of two matrices: its own two, or itself and the identity."""
    whole, first, second = (parts.get(f"{name}{half}") for half in ("", "_a", "_b"))
    if whole is None and first is not None and second is not None:
        return (_widen(first), _widen(second)) if first.shape[1] == second.shape[0] else None
    if whole is None or first is not None or second is not None or min(whole.shape) > HIGHEST_RANK:
        return None
    matrix, one = _widen(whole), torch.eye(min(whole.shape))
    return (one, matrix) if whole.shape[0] <= whole.shape[1] else (matrix, one)


def _factorise_full(difference: torch.Tensor) -> Factors | None:
    """Factors of a matrix whose rank is low up to rounding; None otherwise.

    Probed with more random directions than the highest allowed rank: the images of a matrix of that rank span its
    column space.
    """
    matrix = _squeeze_convolution(to_working_dtype(difference)).double()
    if matrix.dim() != 2 or not bool(torch.isfinite(matrix).all()):
        return None
    allowed = _ROUNDING * max(torch.finfo(difference.dtype).eps, _FINEST) * matrix.norm()
    count = min(HIGHEST_RANK + _SPARE, *matrix.shape)
    directions = torch.randn(matrix.shape[1], count, dtype=matrix.dtype, generator=torch.Generator().manual_seed(0))
    basis = torch.linalg.qr(matrix @ directions)[0]
    rows = basis.T @ matrix
    if (matrix - basis @ rows).norm() > allowed:
        return None
    left, values, right = torch.linalg.svd(rows, full_matrices=False)
    beyond = values.square().flip(0).cumsum(0).flip(0).sqrt()  # norm of each singular value and all smaller ones
    rank = int((beyond > allowed).sum())
    if not _is_low(rank, *matrix.shape):
        return None
    root, dtype = values[:rank].sqrt(), torch.promote_types(to_working_dtype(difference).dtype, torch.float32)
    up, down = (basis @ left[:, :rank] * root).to(dtype), (root[:, None] * right[:rank]).to(dtype)
    if difference.dim() == 4:  # 1 x 1 convolution
        up, down = up[:, :, None, None], down[:, :, None, None]
    return up, down, 1.0


def _is_low(rank: int, out: int, width: int) -> bool:
    return 1 <= rank <= HIGHEST_RANK and rank < min(out, width) and max(out, width) <= WIDEST


def _squeeze_convolution(tensor: torch.Tensor) -> torch.Tensor:
    """The matrix of a 1 x 1 convolution; any other tensor unchanged."""
    return tensor[:, :, 0, 0] if tensor.dim() == 4 and tensor.shape[2:] == (1, 1) else tensor


def _widen(factor: torch.Tensor) -> torch.Tensor:
    """A factor in float32 or wider, where products of half-precision values are exact."""
    return factor.to(torch.promote_types(factor.dtype, torch.float32))
