"""From any format to any other: files written, and what the new format cannot say."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from diffusers_mixofshow.atomic import check_outputs, write_whole
from diffusers_mixofshow.edlora import EDLoRA
from diffusers_mixofshow.edlora.embeddings import part_and_token
from diffusers_mixofshow.edlora.file import FILE_NAME
from diffusers_mixofshow.edlora.low_rank import LowRank
from diffusers_mixofshow.errors import ConfigurationError, EDLoRAFormatError
from diffusers_mixofshow.families.family import POOLED
from diffusers_mixofshow.interop.concept_names import Naming, distinct_names, plain_name
from diffusers_mixofshow.interop.foreign import Foreign, as_edlora, default_base
from diffusers_mixofshow.interop.formats import Format
from diffusers_mixofshow.interop.instructions import instructions
from diffusers_mixofshow.interop.lora_files import (
    EMBEDDINGS,
    PLAIN_NAME,
    announcing,
    transformer_of,
    write_kohya,
    write_lora,
)
from diffusers_mixofshow.interop.opening import read_any
from diffusers_mixofshow.interop.original import ORIGINAL_NAME, write_original
from diffusers_mixofshow.interop.textual_inversion import (
    Vectors,
    has_own_vector,
    lost_in_mean,
    mean_vectors,
    write_textual_inversion,
)


INSTRUCTIONS = "HOW_TO_USE.txt"
SHARED_KEPT = "shared_layers_kept"
"""In an ED-LoRA's `training`: how much of what layer-wise embeddings did is kept beside those that layers share."""


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
    before_writing: Callable[[Sequence[str]], None] = lambda lost: None,
) -> Conversion:
    """Write an ED-LoRA, a fused pack or another program's file in another format.

    Updates stay exactly what they were, but for what `Conversion.lost` names. Of layer-wise embeddings most is lost in
    ``diffusers``, ``kohya`` and ``textual-inversion``: see `diffusers_mixofshow.exporting.share_layers`.

    Args:
        source: An `EDLoRA`, or a file, folder or Hub id of one or of another program, as `load_edlora` takes it.
        output: A folder, or a file where the format is one file. Every file appears whole or not at all.
        to: ``edlora``, this package's own; ``diffusers`` or ``kohya``, an ordinary LoRA with textual-inversion files
            beside it; ``textual-inversion``, these alone; ``mix-of-show``, the authors' ``.pth``.
        name: What prompts shall call the concept; by default the file's own word for it.
        class_word: The plain word for what it is.
        kind: One of ``character``, ``pet``, ``object``, ``scene``.
        base_model: What it was tuned on; by default Stable Diffusion 1.5 where the file is for 1.x.
        layers: The base's cross-attention layers, where nothing in the file tells.
        overwrite: Whether files that are there already may be replaced.
        before_writing: Told `Conversion.lost` before anything is written; what it raises stops the conversion.

    Raises:
        EDLoRANotFoundError: If there is no such file.
        EDLoRAFormatError: If it is defective, or the format cannot hold it; nothing is written then.
        ConfigurationError: If an ED-LoRA is to be written to a file, or a name, class word or kind has no effect.
        ConceptError: If the name or kind is malformed.
        OverwriteError: If one of the files is there already; nothing is written then.
    """
    naming = Naming(name=name, class_word=class_word, kind=kind, base_model=base_model)
    content = source if isinstance(source, EDLoRA | Foreign) else read_any(source)
    plan = plan_conversion(content, output, to, naming, layers, overwrite=overwrite)
    before_writing(plan.lost)
    for write in plan.files.values():
        write()
    return Conversion(files=tuple(plan.files), lost=plan.lost)


@dataclass(frozen=True)
class Plan:
    """Every file to what writes it, and what is lost; all that can be refused has been."""

    files: Mapping[Path, Callable[[], object]]
    lost: tuple[str, ...] = ()


def plan_conversion(
    content: EDLoRA | Foreign,
    output: str | os.PathLike[str],
    to: Format | str,
    naming: Naming,
    layers: tuple[str, ...],
    *,
    overwrite: bool,
) -> Plan:
    """Say what `convert` will write, and refuse what it would refuse."""
    path, target = Path(output), Format(to)
    if isinstance(content, Foreign):
        content.raise_if_defective()
    if target in (Format.EDLORA, Format.MIX_OF_SHOW):
        plan = _plan_concepts(content, path, target, naming, layers, overwrite)
    else:
        plan = _plan_others(content, path, target, naming, layers)
    _refuse_idle(content, target, naming)
    check_outputs(*plan.files, overwrite=overwrite)
    return plan


def _refuse_idle(content: EDLoRA | Foreign, target: Format, naming: Naming) -> None:
    """Refuse a name, class word or kind that would change nothing in what is written."""
    given = {"name": naming.name, "class word": naming.class_word, "kind": naming.kind != Naming().kind}
    idle = {what for what, is_given in given.items() if is_given}
    if isinstance(content, EDLoRA):
        why = "an ED-LoRA keeps those that it has"
    elif not content.tokens and not content.vectors:
        why = "there is no concept in it"
    elif target is Format.EDLORA or (content.tokens and naming.base_model):  # which are put into the LoRA by them
        return
    else:
        why = f"{target.value!r} has no place for them"
        idle -= {"name"}
    if idle:
        raise ConfigurationError(f"Given, but without effect: {', '.join(sorted(idle))}; {why}.")


def _plan_others(
    content: EDLoRA | Foreign, path: Path, target: Format, naming: Naming, layers: tuple[str, ...]
) -> Plan:
    """One of the formats that other programs read, which hold one embedding for all layers."""
    if isinstance(content, Foreign) and content.tokens:
        content = as_edlora(content, naming, layers)
    vectors = _words(content, naming)
    lost = (*(_layers_lost(content) if isinstance(content, EDLoRA) else ()), *_names_lost(vectors))
    if target is Format.TEXTUAL_INVERSION:
        return Plan(_plan_words(path, vectors), (*lost, *_updates_lost(content.lora)))
    base_model = naming.base_model or (content.base_model if isinstance(content, EDLoRA) else "")
    return Plan(_plan_lora(path, content.lora, vectors, lost, target, base_model), lost)


def _plan_concepts(
    content: EDLoRA | Foreign, path: Path, target: Format, naming: Naming, layers: tuple[str, ...], overwrite: bool
) -> Plan:
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
        return Plan({file: partial(write_original, file, content)}, lost)
    if path.suffix == ".safetensors":
        raise ConfigurationError(f"An ED-LoRA is written into a folder. Give {str(path.with_suffix(''))!r} as output.")
    if not content.concepts:
        raise EDLoRAFormatError(
            "There is no embedding in it, and an ED-LoRA has one for each concept. Convert it to 'diffusers' or "
            "'kohya', or fuse it as it is: LoRASource, with its trigger words as prompts."
        )
    if not content.base_model:
        raise EDLoRAFormatError("The file does not tell its base model. Name it: base_model=..., or --base.")
    return Plan({path / FILE_NAME: partial(content.save_pretrained, path, overwrite=overwrite)}, lost)


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


def _plan_words(path: Path, vectors: Mapping[str, Vectors]) -> dict[Path, Callable[[], object]]:
    if not vectors:
        raise EDLoRAFormatError("There is no embedding in it, so there is no textual inversion to write.")
    single = path.suffix == ".safetensors"
    if single and len(vectors) > 1:
        raise EDLoRAFormatError(
            f"It holds {len(vectors)} concepts ({', '.join(vectors)}), and a textual-inversion file holds one. Give "
            "a folder as output."
        )
    names = distinct_names(vectors)
    files = {word: path if single else path / f"{name}.safetensors" for word, name in names.items()}
    return {file: partial(write_textual_inversion, file, vectors[word], word=word) for word, file in files.items()}


def _plan_lora(
    path: Path,
    lora: Mapping[str, LowRank],
    vectors: Mapping[str, Vectors],
    lost: Sequence[str],
    target: Format,
    base_model: str,
) -> dict[Path, Callable[[], object]]:
    """A LoRA, its embeddings in a folder beside it, and a text that says how to use them."""
    if not lora:
        raise EDLoRAFormatError("There is no LoRA in it. Convert it to 'textual-inversion'.")
    if target is Format.KOHYA:
        transformer_of(lora, base_model)  # refuses one that has no names of its own
    names = distinct_names(vectors)
    of_kohya = target is Format.KOHYA
    writer = partial(write_kohya, base_model=base_model) if of_kohya else write_lora
    usual = f"{'-'.join(names.values())[:80] or path.name}.safetensors" if of_kohya else PLAIN_NAME
    file = path if path.suffix == ".safetensors" else path / usual
    files: dict[Path, Callable[[], object]] = {file: partial(writer, file, lora, announcing(vectors))}
    if vectors:
        text = file.with_suffix(".txt") if file is path else path / INSTRUCTIONS
        told = instructions(file.name, names, lost, target)
        files |= _plan_words(file.parent / EMBEDDINGS, vectors)
        files[text] = partial(write_whole, text, told.encode())
    return files


def _names_lost(words: Iterable[str]) -> tuple[str, ...]:
    """Names that programs call words by which are called after their files, where the usual one was taken."""
    changed = {word: name for word, name in distinct_names(words).items() if name != plain_name(word)}
    return tuple(
        f"The name of {word}: its file is called {name}, after others alike." for word, name in changed.items()
    )


def _layers_lost(edlora: EDLoRA) -> tuple[str, ...]:
    """What one embedding in place of those of all layers leaves out, measured."""
    of_layers = {name: rows for name, rows in edlora.embeddings.items() if part_and_token(name)[0] != POOLED}
    shares = {name: lost_in_mean(rows) for name, rows in of_layers.items()}
    kept = edlora.training.get(SHARED_KEPT)
    pooled = (_POOLED_LOST,) if has_own_vector(edlora) else ()
    several = any(part_and_token(name)[0] for name in of_layers)
    if any(shares.values()):
        return (
            _MOST_LOST.format(layers=len(edlora.layers)) + (_DRAW_IT if several else _INSTEAD),
            *(f"{token}: {share:.1%} of its embeddings, |E - mean| / |E|." for token, share in shares.items()),
            *pooled,
        )
    if isinstance(kept, int | float):
        return (f"A part of the layer-wise embeddings: {kept:.1%} of what they do to keys and values is in the LoRA.",)
    return pooled


_POOLED_LOST = (
    "The embeddings for the vector of the whole text, which other programs make with those of the second text encoder."
)
_MOST_LOST = (
    "Most of the identity. Layer-wise embeddings: every token has one for each of {layers} cross-attention layers; "
    "these files hold their mean, an approximation that draws something else where they differ. "
)
_DRAW_IT = "Instead, draw it with diffusers-mixofshow."
_INSTEAD = (
    "Instead, name the base model, so that what they do is put into the LoRA (--base, or share_layers in Python, for "
    "'kohya' and 'diffusers'); or tune by the method ed-lora-shared-layers, which converts without loss; or draw it "
    "with diffusers-mixofshow."
)


def _updates_lost(lora: Mapping[str, LowRank]) -> tuple[str, ...]:
    layers = Counter(site.partition(".")[0] for site in lora)
    told = ", ".join(f"{count} of {component}" for component, count in layers.items())
    return (f"The weight updates of all {len(lora)} layers: {told}.",) if lora else ()
