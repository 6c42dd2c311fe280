"""Words that an embedded base was never shown, so that a prompt with them does not draw what it says."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

from diffusers_mixofshow.base_models import embedded_base
from diffusers_mixofshow.errors import list_first, warn


_MOST_NAMED = 4


def warn_of_unknown_words(base: str, prompts: Sequence[str], names: Collection[str] = ()) -> None:
    """Warn of words of prompts that no caption of an embedded base's pictures had; of no words for other bases.

    Args:
        base: Name of the base model.
        prompts: All prompts of a picture; words in angle brackets, which are concepts, do not count.
        names: Further words that do not count, in lower case: names of concepts, of which the pipeline remarks that
            they lack their brackets.
    """
    known = embedded_base(base)
    if known is None:
        return
    from diffusers_mixofshow.toyland.scenes import caption_words
    from diffusers_mixofshow.toyland.world import BACKGROUNDS

    words = re.findall(r"[^\W\d_]+", re.sub(r"<[^<>]*>", " ", " ".join(prompts)).lower())
    shown = {*caption_words(), *names, *(f"{word}s" for word in known.classes)}  # of several it draws one at least
    strange = [f"'{word}'" for word in dict.fromkeys(words) if word not in shown]
    if strange:
        warn(
            f"{known.id} was never shown {list_first(strange, _MOST_NAMED)}, which it cannot draw. It knows "
            f"{', '.join(known.classes)}, their colours, and these places: {', '.join(BACKGROUNDS)}."
        )
