"""Prompts with concepts as ids: like the tokenizer's own, one place for each concept token."""

import logging

import pytest
import torch

from diffusers_mixofshow.concepts import Concept
from diffusers_mixofshow.conditioning.tokenize import TokenizedPrompts, tokenize, tokenize_plain
from diffusers_mixofshow.errors import ConceptError
from diffusers_mixofshow.families.clip import POSITIONS


PLAIN = ["", "a dog", "  A  dog, on the\tbeach! ", "x" * 74, "x" * 75, "x" * 76, "long " * 40]


def end_positions(tokenized: TokenizedPrompts) -> tuple[int, ...]:
    """Position of each prompt's end token."""
    return tuple(int(length) - 1 for length in tokenized.attention_mask.sum(dim=1))


def test_plain_prompts_get_the_tokenizers_own_ids(tokenizer, concept):
    ours = tokenize(PLAIN, tokenizer, [concept])
    theirs = tokenizer(PLAIN, padding="max_length", truncation=True, max_length=77, return_tensors="pt")
    assert torch.equal(ours.ids, theirs.input_ids)
    assert torch.equal(ours.attention_mask, theirs.attention_mask)
    assert not any(ours.concept_tokens)


def test_ids_for_clip_itself_are_those_of_prompts_without_concepts(tokenizer):
    ids = tokenize_plain(PLAIN, tokenizer)
    assert ids.shape == (len(PLAIN), POSITIONS)
    assert torch.equal(ids, tokenize(PLAIN, tokenizer, []).ids)
    assert tokenize_plain(["a <unknown>"], tokenizer).shape == (1, POSITIONS)


def test_each_concept_token_takes_one_place(tokenizer, concept):
    around = tokenizer("ab, cd").input_ids
    found = tokenize(["ab <potter>, cd", "<potter2>", "<potter><potter1>"], tokenizer, [concept])
    assert found.concept_tokens == (
        {3: "<potter1>", 4: "<potter2>"},
        {1: "<potter2>"},
        {1: "<potter1>", 2: "<potter2>", 3: "<potter1>"},
    )
    ids, ends = found.ids[0].tolist(), end_positions(found)
    assert ids[:3] + ids[5 : ends[0] + 1] == around
    assert ends == (len(around) + 1, 2, 4)
    assert all(
        tokenizer.eos_token_id > found.ids[row, place] for row in range(3) for place in found.concept_tokens[row]
    )


def test_a_long_prompt_is_cut_after_the_tokens_are_put_in(tokenizer, concept, caplog):
    with caplog.at_level(logging.WARNING):
        tokenize(["x" * 73 + " <potter>"], tokenizer, [concept])
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        found = tokenize(["x" * 74 + " <potter> yz"], tokenizer, [concept])
    assert found.concept_tokens == ({75: "<potter1>"},)
    assert found.ids.shape == (1, 77)
    assert found.ids[0, 76] == tokenizer.eos_token_id
    assert "truncated because CLIP can only handle sequences up to 77 tokens: ['<potter2> yz']" in caplog.text


def test_unknown_words_are_errors_and_added_tokens_are_not(tokenizer, concept):
    with pytest.raises(ConceptError, match=r"<poter> \(did you mean <potter>\?\).*Loaded concepts: <potter>"):
        tokenize(["a <poter>"], tokenizer, [concept])
    tokenizer.add_tokens("<cat-toy>")
    found = tokenize(["a <cat-toy> <potter>"], tokenizer, [concept])
    assert found.ids[0, 2] == tokenizer.convert_tokens_to_ids("<cat-toy>")
    assert found.concept_tokens == ({3: "<potter1>", 4: "<potter2>"},)


def test_the_tokenizer_is_left_alone(tokenizer, concept):
    before = tokenizer.get_vocab()
    tokenize(["a <potter>"], tokenizer, [concept, Concept.from_name("thanos", "man")])
    assert tokenizer.get_vocab() == before


def test_prompts_can_be_selected(tokenizer, concept):
    found = tokenize(["a", "<potter>", "b"], tokenizer, [concept])
    chosen = found.select([1, 0])
    assert torch.equal(chosen.ids, found.ids[[1, 0]])
    assert chosen.concept_tokens == (found.concept_tokens[1], {})
    assert tokenize([], tokenizer, [concept]).ids.shape == (0, 77)


@pytest.mark.parametrize("length", range(71, 78))
def test_every_place_where_a_prompt_may_be_cut(tokenizer, concept, caplog, length):
    """75 ids fit between start and end; what is beyond is told, all of it and nothing more."""
    with caplog.at_level(logging.WARNING):
        (row,) = (found := tokenize(["x" * length + " <potter>!"], tokenizer, [concept])).ids.tolist()
    ids = tokenizer("x" * length, add_special_tokens=False).input_ids
    whole = [*ids, 0, 0, *tokenizer("!", add_special_tokens=False).input_ids]
    kept = [tokenizer.bos_token_id, *whole[:75], tokenizer.eos_token_id]
    assert row == kept + [tokenizer.pad_token_id] * (77 - len(kept))
    places = {length + 1: "<potter1>", length + 2: "<potter2>"}
    assert found.concept_tokens == ({place: name for place, name in places.items() if place <= 75},)
    assert end_positions(found) == (len(kept) - 1,)
    assert found.attention_mask[0].tolist() == [1] * len(kept) + [0] * (77 - len(kept))
    lost = [
        word for place, word in ((length, "<potter1>"), (length + 1, "<potter2>"), (length + 2, "!")) if place >= 75
    ]
    told = " ".join(["x" * max(0, length - 75), *lost]).strip()
    assert [record.args for record in caplog.records] == ([(77, [told])] if told else [])
