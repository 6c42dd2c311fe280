"""What errors and warnings are made of: where a warning points, which name was meant, what another error says."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from diffusers_mixofshow.errors import MixOfShowWarning, first_line, suggest, warn


def calling(module: str, inner: Callable[..., None], *arguments: str) -> Callable[..., None]:
    """A function of a module of that name, in a file called after it, whose third line calls `inner`."""
    space = {"__name__": module, "inner": inner, "arguments": arguments}
    exec(compile("def outer():\n    pass\n    inner(*arguments)\n", f"{module}.py", "exec"), space)
    return space["outer"]


@pytest.mark.parametrize(
    ("modules", "told"),
    [
        (["theirs"], "theirs"),
        (["theirs", "diffusers_mixofshow"], "theirs"),
        (["theirs", "diffusers_mixofshow.fusion.fuser", "diffusers_mixofshow.regions"], "theirs"),
        (["theirs", "diffusers.pipelines.pipeline_utils"], "theirs"),
        (["theirs", "torch.utils._contextlib"], "theirs"),
        (["theirs", "contextlib"], "theirs"),
        (["theirs", "diffusers_mixofshow.cli", "torch.nn", "contextlib", "diffusers", "torch"], "theirs"),
        # What calls the user's line is not its concern.
        (["outermost", "diffusers_mixofshow.cli", "theirs", "diffusers_mixofshow.regions"], "theirs"),
        (["outermost", "theirs", "diffusers"], "theirs"),
        # Names that only begin or end alike are somebody else's.
        (["torchvision.models"], "torchvision.models"),
        (["diffusers_mixofshow_studio"], "diffusers_mixofshow_studio"),
        (["theirs.torch", "diffusers"], "theirs.torch"),
        (["transformers.modeling", "torch"], "transformers.modeling"),
    ],
)
def test_a_warning_points_at_the_nearest_line_of_somebody_else(modules: Sequence[str], told: str) -> None:
    call = calling("diffusers_mixofshow.noticing", warn, "it is so")
    for module in reversed(modules):
        call = calling(module, call)
    with pytest.warns(MixOfShowWarning, match=r"^it is so$") as caught:
        call()
    assert [(each.filename, each.lineno) for each in caught] == [(f"{told}.py", 3)]


@pytest.mark.parametrize(
    ("word", "known", "question"),
    [
        ("steps", ["seed", "steps_", "prompt"], " Did you mean steps_?"),
        ("rnak", iter(["alpha", "rank", "bank"]), " Did you mean rank?"),
        ("zzz", ["rank", "alpha"], ""),
        ("rank", [], ""),
    ],
)
def test_the_name_that_is_spelt_most_alike_is_asked_for(word: str, known: Sequence[str], question: str) -> None:
    assert suggest(word, known) == question


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("one.\ntwo."), "one"),
        (ValueError("\n  one\n"), "one"),
        (OSError("no dots."), "no dots"),
        (KeyError(), "KeyError"),
        (ValueError(" \n "), "ValueError"),
    ],
)
def test_of_an_error_the_first_line_is_told_or_its_type(error: Exception, line: str) -> None:
    assert first_line(error) == line
