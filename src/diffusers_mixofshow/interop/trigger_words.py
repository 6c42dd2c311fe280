"""Find the trigger words of a plain LoRA in the metadata of its file."""

from __future__ import annotations

import re
from collections.abc import Mapping

from diffusers_mixofshow.edlora.header import decode


_PHRASE = "modelspec.trigger_phrase"
_BY_FOLDER = ("ss_dataset_dirs", "ss_tag_frequency")
"""Keys of kohya's trainers for the folders of photos, such as ``10_sks dog``: number of repeats, then the caption.

ai-toolkit writes its trigger word in the same way.
"""
_REPEATED = re.compile(r"\d+_(.+)")
_LONGEST = 100


def find_trigger_words(metadata: Mapping[str, str]) -> tuple[str, ...]:
    """Find the trigger words in a file's metadata, which is untrusted text.

    Args:
        metadata: Metadata of a safetensors file.

    Returns:
        Each phrase once; empty if there is none.
    """
    phrases = [metadata.get(_PHRASE, "")]
    for key in _BY_FOLDER:
        folders = decode(metadata.get(key, ""))
        names = folders if isinstance(folders, dict) else {}
        phrases += [match[1] for name in names if (match := _REPEATED.fullmatch(name))]
    plain = (" ".join(phrase.split()) for phrase in phrases)
    return tuple(dict.fromkeys(phrase for phrase in plain if 0 < len(phrase) <= _LONGEST and phrase.isprintable()))
