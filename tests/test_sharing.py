"""Threads that use a model stand beside each other; one that changes it is alone with it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest

from diffusers_mixofshow.errors import ConfigurationError
from diffusers_mixofshow.sharing import changing, using


class Model:
    """Something that can be referred to weakly."""


def elsewhere(action: Callable[[], object]) -> str:
    """What another thread is refused with; empty if it may."""
    said = [""]

    def act() -> None:
        try:
            action()
        except ConfigurationError as error:
            said[0] = str(error)

    thread = threading.Thread(target=act)
    thread.start()
    thread.join()
    return said[0]


def entering(kind: Any, *things: object, **settings: str) -> Callable[[], None]:
    def enter() -> None:
        with kind(*things, **settings):
            pass

    return enter


CHANGES = "Another thread is changing this Model: it loads, trains or fuses a concept"
USES = "Another thread draws or trains with this Model, so that nothing can be loaded into it"


@pytest.mark.parametrize(
    ("mine", "theirs", "refused"),
    [(using, using, ""), (using, changing, USES), (changing, using, CHANGES), (changing, changing, USES)],
)
def test_what_two_threads_may_do_at_once(mine: Any, theirs: Any, refused: str) -> None:
    model, other = Model(), Model()
    for _ in range(2):  # what is over leaves nothing behind
        with mine(model):
            with mine(model):
                pass
            assert elsewhere(entering(theirs, other)) == ""
            said = elsewhere(entering(theirs, other, model))
            assert said.startswith(refused)
            assert bool(said) is bool(refused)
            assert elsewhere(entering(changing, other)) == ""  # nothing was entered of what was refused
        assert elsewhere(entering(theirs, model, other)) == ""


def test_one_thread_may_do_both_and_hears_that_it_was_changing() -> None:
    model, other = Model(), Model()
    with changing(model) as first, using(model), changing(other, model) as again, changing(other) as third:
        assert (first, again, third) == (False, True, True)
    with using(model), changing(model) as after:
        assert after is False


def test_a_refusal_may_say_more() -> None:
    model = Model()
    with using(model):
        assert elsewhere(entering(changing, model, refusal="Not now.")) == "Not now."


@pytest.mark.parametrize("kind", [using, changing])
def test_an_error_inside_sets_it_free(kind: Any) -> None:
    model = Model()
    with pytest.raises(KeyError), ExitStack() as stack:  # noqa: PT012
        stack.enter_context(kind(model))
        raise KeyError
    assert elsewhere(entering(changing, model)) == ""
