"""Convert any supported format to any other, and report what the new format cannot hold."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from diffusers_mixofshow.atomic import check_outputs, write_whole
from diffusers_mixofshow.edlora import EDLoRA
from diffusers_mixofshow.edlora.embeddings import split_name
from diffusers_mixofshow.edlora.file import FILE_NAME, PLAIN_NAME
from diffusers_mixofshow.edlora.low_rank import LowRank
from diffusers_mixofshow.errors import ConfigurationError, EDLoRAFormatError, suggest
from diffusers_mixofshow.families.family import POOLED
from diffusers_mixofshow.interop.concept_names import Meaning, Naming, distinct_names, plain_name
from diffusers_mixofshow.interop.foreign import Foreign, default_base, to_edlora
from diffusers_mixofshow.interop.formats import Format
from diffusers_mixofshow.interop.instructions import compose_instructions
from diffusers_mixofshow.interop.lora_files import (
    EMBEDDINGS,
    companions_metadata,
    transformer_of,
    write_kohya,
    write_lora,
)
from diffusers_mixofshow.interop.opening import read_any
from diffusers_mixofshow.interop.original import ORIGINAL_NAME, write_original
from diffusers_mixofshow.interop.textual_inversion import (
    Vectors,
    find_meanings,
    has_own_vector,
    lost_in_mean,
    mean_vectors,
    write_textual_inversion,
)
from diffusers_mixofshow.interop.trigger_words import keep_words_and_record


INSTRUCTIONS = "HOW_TO_USE.txt"
SHARED_KEPT = "shared_layers_kept"
"""Key in an ED-LoRA's `training`: share of the layer-wise embeddings' effect that was moved into the LoRA."""


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """Result of a conversion.

    Args:
        files: All written files.
        lost: What the source holds and these files do not, each as a sentence; empty if nothing.
        notes: What is unexpected in these files without being a loss, each as a sentence.
    """

    files: tuple[Path, ...]
    lost: tuple[str, ...]
    notes: tuple[str, ...] = ()


def convert(
    source: EDLoRA | Foreign | str | os.PathLike[str],
    output: str | os.PathLike[str],
    to: Format | str,
    *,
    name: str = "",
    class_word: str = "",
    kind: str = "",
    base_model: str = "",
    layers: tuple[str, ...] = (),
    overwrite: bool = False,
    before_writing: Callable[[Sequence[str]], None] = lambda lost: None,
) -> Conversion:
    """Write an ED-LoRA, a fused pack or another program's file in another format.

    Updates are converted exactly, except for what `Conversion.lost` lists. ``diffusers``, ``kohya`` and
    ``textual-inversion`` lose most of layer-wise embeddings: see `diffusers_mixofshow.exporting.share_layers`.

    Args:
        source: An `EDLoRA`, or a file, folder or Hub id of one or of another program, as `load_edlora` takes it.
        output: A folder, or a file if the format is a single file. Every file appears whole or not at all.
        to: ``edlora``, this package's own; ``diffusers`` or ``kohya``, a plain LoRA with textual-inversion files
            beside it; ``textual-inversion``, only these; ``mix-of-show``, the authors' ``.pth``.
        name: Name of the concept in prompts; by default the file's own word for it.
        class_word: The plain word for what it is; by default the file's own.
        kind: One of ``character``, ``pet``, ``object``, ``scene``; by default the file's own, else ``object``.
        base_model: Base model it was tuned on; by default Stable Diffusion 1.5 for files of 1.x.
        layers: The base's cross-attention layers, if they cannot be recognised from the file.
        overwrite: Replace files that exist.
        before_writing: Called with `Conversion.lost` before anything is written; its error stops the conversion.

    Raises:
        EDLoRANotFoundError: If there is no such file.
        EDLoRAFormatError: If the source is defective, or the format cannot hold it; nothing is written then.
        ConfigurationError: If there is no such format, an ED-LoRA is to be written to a file, or a name, class word or
            kind has no effect.
        ConceptError: If the name or kind is malformed.
        OverwriteError: If one of the files exists; nothing is written then.
    """
    naming = Naming(name=name, class_word=class_word, kind=kind, base_model=base_model)
    content = source if isinstance(source, EDLoRA | Foreign) else read_any(source)
    plan = plan_conversion(content, output, to, naming, layers, overwrite=overwrite)
    before_writing(plan.lost)
    for write in plan.files.values():
        write()
    return Conversion(files=tuple(plan.files), lost=plan.lost, notes=plan.notes)


@dataclass(frozen=True)
class Plan:
    """A checked conversion: every file to the function that writes it, what is lost, and what is unexpected."""

    files: Mapping[Path, Callable[[], object]]
    lost: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def plan_conversion(
    content: EDLoRA | Foreign,
    output: str | os.PathLike[str],
    to: Format | str,
    naming: Naming,
    layers: tuple[str, ...],
    *,
    overwrite: bool,
) -> Plan:
    """Plan what `convert` will write; raises the same errors."""
    path, target = Path(output), _read_format(to)
    if isinstance(content, Foreign):
        content.raise_if_defective()
    if target in (Format.EDLORA, Format.MIX_OF_SHOW):
        plan = _plan_concepts(content, path, target, naming, layers, overwrite)
    else:
        plan = _plan_others(content, path, target, naming, layers)
    _refuse_idle(content, target, naming)
    check_outputs(*plan.files, overwrite=overwrite)
    return plan


def _read_format(name: Format | str) -> Format:
    if name not in {*Format}:
        raise ConfigurationError(
            f"Got the format {name!r}; expected one of {', '.join(Format)}.{suggest(name, Format)}"
        )
    return Format(name)


def _refuse_idle(content: EDLoRA | Foreign, target: Format, naming: Naming) -> None:
    """Refuse a name, class word or kind that would change nothing in what is written."""
    given = {"name": naming.name, "class word": naming.class_word, "kind": naming.kind}
    idle = {what for what, is_given in given.items() if is_given}
    if isinstance(content, EDLoRA):
        why = "an ED-LoRA keeps those that it has"
    elif not content.tokens and not content.vectors:
        why = "there is no concept in it"
    elif target is Format.EDLORA or (content.tokens and naming.base_model and target is not Format.MIX_OF_SHOW):
        return
    else:
        why = f"{target.value!r} has no place for them"
        idle -= {"name"}
    if idle:
        raise ConfigurationError(f"Given, but without effect: {', '.join(sorted(idle))}; {why}.")


def _plan_others(
    content: EDLoRA | Foreign, path: Path, target: Format, naming: Naming, layers: tuple[str, ...]
) -> Plan:
    """Plan one of the formats of other programs, which hold one embedding for all layers."""
    if isinstance(content, Foreign) and content.tokens:
        content = to_edlora(content, naming, layers)
    words = _collect_words(content, naming)
    lost = (*(_layers_lost(content) if isinstance(content, EDLoRA) else ()), *_names_lost(words.vectors))
    if target is Format.TEXTUAL_INVERSION:
        return Plan(_plan_words(path, words), (*lost, *_updates_lost(content.lora)))
    base_model = naming.base_model or content.base_model
    kept = keep_words_and_record(content.metadata) if isinstance(content, Foreign) else {}
    files = _plan_lora(path, content.lora, words, lost, target, base_model, kept)
    return Plan(files, lost, _list_kept_names(content.lora, base_model) if target is Format.KOHYA else ())


def _list_kept_names(lora: Mapping[str, LowRank], base_model: str) -> tuple[str, ...]:
    """Tell that the layers of a transformer do not get kohya's names, as ComfyUI or diffusers would not load these."""
    family = transformer_of(lora, base_model)
    if family is None or family.shared_names.startswith("lora_"):
        return ()
    names = "the original code's names" if "{original}" in family.shared_names else "diffusers' names"
    return (f"Of {family.name}, layers have {names}, under which both ComfyUI and diffusers load them, not kohya's.",)


def _plan_concepts(
    content: EDLoRA | Foreign, path: Path, target: Format, naming: Naming, layers: tuple[str, ...], overwrite: bool
) -> Plan:
    """Plan one of the two formats that hold layer-wise embeddings."""
    lost: tuple[str, ...] = ()
    if isinstance(content, Foreign):
        if not naming.base_model and (guess := default_base(content)):
            naming = replace(naming, base_model=guess)
            lost = (f"The file does not name its base model; {guess} was assumed.",)
        content = to_edlora(content, naming, layers)
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
            "It holds no embedding, and an ED-LoRA has one for each concept. Convert it to 'diffusers' or 'kohya', or "
            "fuse it as it is: LoRASource, with its trigger words in the prompts."
        )
    if not content.base_model:
        raise EDLoRAFormatError("The file does not name its base model. Give it: base_model=..., or --base.")
    return Plan({path / FILE_NAME: partial(content.save_pretrained, path, overwrite=overwrite)}, lost)


@dataclass(frozen=True)
class _Words:
    """Every word to its vectors, and to what is known of its concept."""

    vectors: Mapping[str, Vectors]
    meanings: Mapping[str, Meaning]


def _collect_words(content: EDLoRA | Foreign, naming: Naming) -> _Words:
    """Collect the words of a source; the vectors of an ED-LoRA are means over layers."""
    if isinstance(content, EDLoRA):
        return _Words(mean_vectors(content), find_meanings(content))
    if naming.name and len(content.vectors) > 1:
        raise EDLoRAFormatError(
            f"It holds embeddings of several words ({', '.join(content.vectors)}); one name cannot be given to all."
        )
    if naming.name:
        new = {word: f"<{plain_name(naming.name)}>" for word in content.vectors}  # of one word, or none
        meanings = {new[word]: meaning for word, meaning in content.meanings.items()}
        return _Words({new[word]: vectors for word, vectors in content.vectors.items()}, meanings)
    return _Words(content.vectors, content.meanings)


def _plan_words(path: Path, words: _Words) -> dict[Path, Callable[[], object]]:
    vectors = words.vectors
    if not vectors:
        raise EDLoRAFormatError("It holds no embedding, so there is no textual inversion to write.")
    single = path.suffix == ".safetensors"
    if single and len(vectors) > 1:
        raise EDLoRAFormatError(
            f"It holds {len(vectors)} concepts ({', '.join(vectors)}), and a textual-inversion file holds one. Give "
            "a folder as output."
        )
    names = distinct_names(vectors)
    files = {word: path if single else path / f"{name}.safetensors" for word, name in names.items()}
    write = write_textual_inversion
    return {
        file: partial(write, file, vectors[word], word=word, meaning=words.meanings.get(word))
        for word, file in files.items()
    }


def _plan_lora(
    path: Path,
    lora: Mapping[str, LowRank],
    words: _Words,
    lost: Sequence[str],
    target: Format,
    base_model: str,
    kept: Mapping[str, str],
) -> dict[Path, Callable[[], object]]:
    """Plan a LoRA file, its embeddings in a folder beside it, and instructions for their use."""
    if not lora:
        raise EDLoRAFormatError("It holds no LoRA. Convert it to 'textual-inversion'.")
    if target is Format.KOHYA:
        transformer_of(lora, base_model)  # refuses a LoRA of an ambiguous transformer
    names = distinct_names(words.vectors)
    of_kohya = target is Format.KOHYA
    writer = partial(write_kohya, base_model=base_model) if of_kohya else write_lora
    usual = f"{'-'.join(names.values())[:80] or path.resolve().name}.safetensors" if of_kohya else PLAIN_NAME
    file = path if path.suffix == ".safetensors" else path / usual
    metadata = {**kept, **companions_metadata(names)}
    files: dict[Path, Callable[[], object]] = {file: partial(writer, file, lora, metadata)}
    if names:
        text = file.with_suffix(".txt") if file is path else path / INSTRUCTIONS
        encoders = {name: list(words.vectors[word]) for word, name in names.items()}
        told = compose_instructions(file.name, encoders, lost, target)
        files |= _plan_words(file.parent / EMBEDDINGS, words)
        files[text] = partial(write_whole, text, told.encode())
    return files


def _names_lost(words: Iterable[str]) -> tuple[str, ...]:
    """Words whose files need another name because it is taken; programs use the file name as the word."""
    changed = {word: name for word, name in distinct_names(words).items() if name != plain_name(word)}
    return tuple(
        f"The name of {word}: its file is called {name}, as the usual name is taken or reserved."
        for word, name in changed.items()
    )


def _layers_lost(edlora: EDLoRA) -> tuple[str, ...]:
    """What replacing layer-wise embeddings by their mean loses, with measured shares."""
    of_layers = {name: rows for name, rows in edlora.embeddings.items() if split_name(name)[0] != POOLED}
    shares = {name: lost_in_mean(rows) for name, rows in of_layers.items()}
    kept = edlora.training.get(SHARED_KEPT)
    pooled = (_POOLED_LOST,) if has_own_vector(edlora) else ()
    if any(shares.values()):
        return (
            _MOST_LOST.format(layers=len(edlora.layers)) + _INSTEAD,
            *(f"{token}: {share:.1%} of its embeddings, |E - mean| / |E|." for token, share in shares.items()),
            *pooled,
        )
    if isinstance(kept, int | float):
        part = f"A part of the layer-wise embeddings: {kept:.1%} of what they do to keys and values is in the LoRA."
        return (part, *pooled)
    return pooled


_POOLED_LOST = "The embeddings for the pooled text vector; other programs use those of the second text encoder for it."
_MOST_LOST = (
    "Most of the identity. Layer-wise embeddings: every token has one for each of {layers} cross-attention layers; "
    "these files hold their mean, which gives other pictures where the layers differ. "
)
_INSTEAD = (
    "Instead, name the base model, so that their effect moves into the LoRA (--base, or share_layers in Python, for "
    "'kohya' and 'diffusers'); or tune with the method ed-lora-shared-layers, which converts without loss; or sample "
    "it with diffusers-mixofshow."
)


def _updates_lost(lora: Mapping[str, LowRank]) -> tuple[str, ...]:
    layers = Counter(site.partition(".")[0] for site in lora)
    told = ", ".join(f"{count} of {component}" for component, count in layers.items())
    return (f"The weight updates of all {len(lora)} layers: {told}.",) if lora else ()
