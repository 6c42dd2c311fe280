"""From any format to any other: files written, and what the new format cannot say."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from diffusers_mixofshow.atomic import check_outputs, write_whole
from diffusers_mixofshow.edlora import EDLoRA
from diffusers_mixofshow.edlora.low_rank import LowRank
from diffusers_mixofshow.errors import ConfigurationError, EDLoRAFormatError
from diffusers_mixofshow.interop.concept_names import Naming, plain_name
from diffusers_mixofshow.interop.foreign import Foreign, as_edlora, default_base, read_foreign
from diffusers_mixofshow.interop.formats import Format
from diffusers_mixofshow.interop.instructions import instructions
from diffusers_mixofshow.interop.lora_files import EMBEDDINGS, PLAIN_NAME, announcing, write_kohya, write_lora
from diffusers_mixofshow.interop.original import ORIGINAL_NAME, write_original
from diffusers_mixofshow.interop.textual_inversion import (
    Vectors,
    lost_in_mean,
    mean_vectors,
    write_textual_inversion,
)


INSTRUCTIONS = "HOW_TO_USE.txt"


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """What a conversion wrote.

    Args:
        files: All files.
        lost: What the source says and these files do not, each as a sentence; empty if nothing.
    """

    files: tuple[Path, ...]
    lost: tuple[str, ...]


def convert(
    source: EDLoRA | Foreign | str | os.PathLike[str],
    output: str | os.PathLike[str],
    to: Format | str,
    *,
    name: str = "",
    class_word: str = "",
    kind: str = "object",
    base_model: str = "",
    layers: tuple[str, ...] = (),
    overwrite: bool = False,
) -> Conversion:
    """Write an ED-LoRA, a fused pack or another program's file in another format.

    Tensors keep their dtype and ranks and alphas their values, so that the way there and back is exact, but for what
    `Conversion.lost` names.

    Args:
        source: An `EDLoRA`, or another program's file or folder, see `read_as_edlora`.
        output: A folder, or a file where the format is one file. Every file appears whole or not at all.
        to: ``edlora``, this package's own; ``diffusers`` or ``kohya``, an ordinary LoRA with textual-inversion files
            beside it; ``textual-inversion``, these alone; ``mix-of-show``, the authors' ``.pth``.
        name: What prompts shall call the concept; by default the file's own word for it.
        class_word: The plain word for what it is.
        kind: One of ``character``, ``pet``, ``object``, ``scene``.
        base_model: What it was tuned on; by default Stable Diffusion 1.5 where the file is for 1.x.
        layers: The base's cross-attention layers, where nothing in the file tells.
        overwrite: Whether files that are there already may be replaced.

    Raises:
        EDLoRANotFoundError: If there is no such file.
        EDLoRAFormatError: If it is defective, or the format cannot hold it; nothing is written then.
        ConfigurationError: If an ED-LoRA is to be written to a file.
        ConceptError: If the name or kind is malformed.
        OverwriteError: If one of the files is there already; nothing is written then.
    """
    naming = Naming(name=name, class_word=class_word, kind=kind, base_model=base_model)
    content = source if isinstance(source, EDLoRA | Foreign) else read_foreign(source)
    path, target = Path(output), Format(to)
    if isinstance(content, Foreign):
        content.raise_if_defective()
    if target in (Format.EDLORA, Format.MIX_OF_SHOW):
        return _as_concepts(content, path, target, naming, layers, overwrite=overwrite)
    if isinstance(content, Foreign) and content.tokens:
        content = as_edlora(content, naming, layers)
    vectors = _words(content, naming)
    lost = _layers_lost(content) if isinstance(content, EDLoRA) else ()
    if target is Format.TEXTUAL_INVERSION:
        return _write_words(path, vectors, (*lost, *_updates_lost(content.lora)), overwrite=overwrite)
    writer = write_kohya if target is Format.KOHYA else write_lora
    return _write_lora_and_words(path, content, vectors, lost, writer, overwrite=overwrite)


def _as_concepts(
    content: EDLoRA | Foreign,
    path: Path,
    target: Format,
    naming: Naming,
    layers: tuple[str, ...],
    *,
    overwrite: bool,
) -> Conversion:
    """One of the two formats that hold layer-wise embeddings."""
    lost: tuple[str, ...] = ()
    if isinstance(content, Foreign):
        if not naming.base_model and (guess := default_base(content)):
            naming = replace(naming, base_model=guess)
            lost = (f"The file does not tell its base model; {guess} was taken.",)
        content = as_edlora(content, naming, layers)
    if target is Format.MIX_OF_SHOW:
        file = path if path.suffix == ".pth" else path / ORIGINAL_NAME
        if content.training or content.base_model:
            lost = (
                *lost,
                "The authors' layout has no place for the base model, class words and settings.",
            )
        check_outputs(file, overwrite=overwrite)
        return Conversion(files=(write_original(file, content),), lost=lost)
    if path.suffix == ".safetensors":
        raise ConfigurationError(f"An ED-LoRA is written into a folder. Give {str(path.with_suffix(''))!r} as output.")
    if not content.concepts:
        raise EDLoRAFormatError(
            "There is no embedding in it, and an ED-LoRA has one for each concept. Convert it to 'diffusers' or "
            "'kohya', or fuse it as it is: LoRASource, with its trigger words as prompts."
        )
    if not content.base_model:
        raise EDLoRAFormatError("The file does not tell its base model. Name it: base_model=..., or --base.")
    return Conversion(files=(content.save_pretrained(path, overwrite=overwrite),), lost=lost)


def _words(content: EDLoRA | Foreign, naming: Naming) -> dict[str, Vectors]:
    """Every word to its vectors; of an ED-LoRA, their means over layers."""
    if isinstance(content, EDLoRA):
        return mean_vectors(content)
    if naming.name and len(content.vectors) > 1:
        raise EDLoRAFormatError(
            f"It holds embeddings of several words ({', '.join(content.vectors)}), so that one name cannot be given."
        )
    if naming.name:
        return {f"<{plain_name(naming.name)}>": vectors for vectors in content.vectors.values()}
    return dict(content.vectors)


def _write_words(path: Path, vectors: Mapping[str, Vectors], lost: tuple[str, ...], *, overwrite: bool) -> Conversion:
    if not vectors:
        raise EDLoRAFormatError("There is no embedding in it, so there is no textual inversion to write.")
    single = path.suffix == ".safetensors"
    if single and len(vectors) > 1:
        raise EDLoRAFormatError(
            f"It holds {len(vectors)} concepts ({', '.join(vectors)}), and a textual-inversion file holds one. Give "
            "a folder as output."
        )
    files = [path] if single else _word_files(path, vectors)
    check_outputs(*files, overwrite=overwrite)
    for file, (word, them) in zip(files, vectors.items(), strict=True):
        write_textual_inversion(file, them, word=word)
    return Conversion(files=tuple(files), lost=lost)


def _word_files(folder: Path, words: Iterable[str]) -> list[Path]:
    return [folder / f"{plain_name(word)}.safetensors" for word in words]


def _write_lora_and_words(
    path: Path,
    content: EDLoRA | Foreign,
    vectors: Mapping[str, Vectors],
    lost: tuple[str, ...],
    writer: Callable[[Path, Mapping[str, LowRank], Mapping[str, str]], Path],
    *,
    overwrite: bool,
) -> Conversion:
    if not content.lora:
        raise EDLoRAFormatError("There is no LoRA in it. Convert it to 'textual-inversion'.")
    names = [plain_name(word) for word in vectors]
    usual = PLAIN_NAME if writer is write_lora else f"{'-'.join(names)[:80] or path.name}.safetensors"
    file = path if path.suffix == ".safetensors" else path / usual
    folder, text = file.parent / EMBEDDINGS, file.with_suffix(".txt") if file is path else path / INSTRUCTIONS
    files = [file, *_word_files(folder, vectors), *([text] if vectors else [])]
    check_outputs(*files, overwrite=overwrite)
    writer(file, content.lora, announcing(vectors))
    if vectors:
        _write_words(folder, vectors, (), overwrite=True)
        write_whole(text, instructions(file.name, vectors, lost).encode())
    return Conversion(files=tuple(files), lost=lost)


def _layers_lost(edlora: EDLoRA) -> tuple[str, ...]:
    """What the means over layers leave out, measured."""
    shares = {token: lost_in_mean(rows) for token, rows in edlora.embeddings.items()}
    if not any(shares.values()):
        return ()
    return (
        f"Layer-wise embeddings: every token has one for each of {len(edlora.layers)} cross-attention layers, and "
        "these files hold their mean, an approximation.",
        *(f"{token}: {share:.1%} of its embeddings, |E - mean| / |E|." for token, share in shares.items()),
    )


def _updates_lost(lora: Mapping[str, LowRank]) -> tuple[str, ...]:
    layers = Counter(site.partition(".")[0] for site in lora)
    told = ", ".join(f"{count} of {component}" for component, count in layers.items())
    return (f"The weight updates of all {len(lora)} layers: {told}.",) if lora else ()
