"""Find the trigger words of a plain LoRA: in the metadata of its file, or in the record of a pack fused from it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from diffusers_mixofshow.edlora.fusion_record import (
    PLAIN_KEY,
    as_mapping,
    find_plain_prompts,
    list_entries,
)
from diffusers_mixofshow.edlora.header import decode


TOLD = "trigger_words"
"""Key of the entry `training` of a plain LoRA that was read: the trigger words that its file told."""

_PHRASE = "modelspec.trigger_phrase"
_BY_FOLDER = ("ss_dataset_dirs", "ss_tag_frequency")
"""Keys of kohya's trainers for the folders of photos, such as ``10_sks dog``: number of repeats, then the caption.

ai-toolkit writes its trigger word in the same way.
"""
_REPEATED = re.compile(r"\d+_(.+)")
_LONGEST = 100
_MOST_PROMPTS, _MOST_WORDS = 64, 100
"""How many prompts are read, and how many words of each."""
_PUNCTUATION = ',.;:!?"()'
_FILLERS = frozenset("a an the of in on at with by and photo photograph picture image".split())
"""Words of many prompts that no trigger words begin or end with."""


def keep_words_and_record(metadata: Mapping[str, str]) -> dict[str, str]:
    """The entries of a plain LoRA's metadata that tell its trigger words, and the record of what it was fused from."""
    return {key: metadata[key] for key in (PLAIN_KEY, _PHRASE, *_BY_FOLDER) if key in metadata}


def find_trigger_words(metadata: Mapping[str, str]) -> tuple[str, ...]:
    """Find the trigger words in a file's metadata, which is untrusted text.

    Args:
        metadata: Metadata of a safetensors file.

    Returns:
        Each phrase once; empty if there is none.
    """
    return tuple(find_origins(metadata))


def find_origins(metadata: Mapping[str, str]) -> dict[str, str]:
    """Find the trigger words in a file's untrusted metadata, with notes whether they are stated there or guessed."""
    found = dict.fromkeys(_keep_plain([metadata.get(_PHRASE, "")]), f"stated by the file ({_PHRASE})")
    for key in _BY_FOLDER:
        folders = decode(metadata.get(key, ""))
        names = folders if isinstance(folders, dict) else {}
        for phrase in _keep_plain(match[1] for name in names if (match := _REPEATED.fullmatch(name))):
            found.setdefault(phrase, f"guessed from the names of folders that it was tuned on ({key})")
    return found


def trigger_words_of_sources(training: Mapping[str, object]) -> dict[str, tuple[str, ...]]:
    """Find the trigger words of every plain LoRA that a pack was fused from, in the pack's untrusted record.

    These are the words that the LoRA's file told, if the prompts that it was fused with say them; else the words that
    all of these prompts share.

    Returns:
        Name of the LoRA to its trigger words; to none if its prompts share no word.
    """
    prompts, said = find_plain_prompts(training), find_said_words(training)
    return {name: words or _keep_plain([find_shared_words(prompts[name])]) for name, words in said.items()}


def origins_of_sources(training: Mapping[str, object]) -> dict[str, str]:
    """Note of every plain LoRA that a pack was fused from, if it has trigger words, where these were found."""
    said = find_said_words(training)
    return {
        name: "told by its file" if said[name] else "guessed, the words that its prompts share"
        for name, words in trigger_words_of_sources(training).items()
        if words
    }


def find_said_words(training: Mapping[str, object]) -> dict[str, tuple[str, ...]]:
    """The words that the file of each of a pack's plain LoRAs told, as far as one of its prompts says them."""
    told = {
        name: words_in_training(as_mapping(entry.get("training")))
        for entry in list_entries(training)
        if isinstance(entry.get("concepts"), list)
        for name in entry["concepts"]
        if isinstance(name, str)
    }
    return {
        name: tuple(words for words in told.get(name, ()) if any(words in prompt for prompt in prompts))
        for name, prompts in find_plain_prompts(training).items()
    }


def words_in_training(training: Mapping[str, object]) -> tuple[str, ...]:
    """The trigger words that a plain LoRA's file told, in the untrusted entry `training` of what was read from it."""
    words = training.get(TOLD)
    return _keep_plain(word for word in words if isinstance(word, str)) if isinstance(words, list) else ()


def find_shared_words(prompts: Sequence[str]) -> str:
    """The longest run of words that all prompts share, in any case; it neither begins nor ends with a filler word.

    Args:
        prompts: Of many and of long ones only the beginning is read.

    Returns:
        The run as the first prompt spells it; of equally long ones the first. Empty if there is none.
    """
    first, *others = [prompt.split()[:_MOST_WORDS] for prompt in prompts[:_MOST_PROMPTS]] or [[]]
    texts = [_join(other) for other in others]
    for length in range(len(first), 0, -1):
        for start in range(len(first) - length + 1):
            run = first[start : start + length]
            ends = {_join(run[:1]).strip(), _join(run[-1:]).strip()}
            if not ends & _FILLERS and all(_join(run) in text for text in texts):
                return " ".join(run).strip(_PUNCTUATION)
    return ""


def _join(words: Iterable[str]) -> str:
    """Words in lower case without their punctuation, with a space before and behind each."""
    return f" {' '.join(word.strip(_PUNCTUATION) for word in words)} ".casefold()


def _keep_plain(phrases: Iterable[str]) -> tuple[str, ...]:
    """Each phrase once, in one line, without those that are empty, too long or hold control characters."""
    plain = (" ".join(phrase.split()) for phrase in phrases)
    return tuple(dict.fromkeys(phrase for phrase in plain if 0 < len(phrase) <= _LONGEST and phrase.isprintable()))
