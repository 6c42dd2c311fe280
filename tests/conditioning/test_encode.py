"""Layer-wise encodings against the text encoder run by hand, one layer at a time."""

import pytest
import torch

from diffusers_mixofshow.conditioning.encode import encode
from diffusers_mixofshow.conditioning.tokenize import tokenize
from diffusers_mixofshow.errors import ConceptError


def _by_hand(text_encoder, tokenized, embeddings, layer, clip_skip=None):
    """Encode with the concept's rows of one layer written into a copy of the embedding table."""
    table = text_encoder.get_input_embeddings()
    original = table.weight.data
    ids = tokenized.ids.clone()
    extra = [embeddings[name][layer] for names in tokenized.concept_tokens for name in names.values()]
    table.weight.data = torch.cat([original, torch.stack(extra)])
    new = iter(range(len(original), len(original) + len(extra)))
    for row, names in enumerate(tokenized.concept_tokens):
        for place in names:
            ids[row, place] = next(new)
    output = text_encoder(ids, output_hidden_states=True)
    table.weight.data = original
    if clip_skip is None:
        return output.last_hidden_state
    inner = getattr(text_encoder, "text_model", text_encoder)
    return inner.final_layer_norm(output.hidden_states[-(clip_skip + 1)])


@pytest.mark.parametrize("clip_skip", [None, 1])
def test_layer_k_is_encoded_with_embedding_k(text_encoder, tokenizer, concept, embeddings, layers, clip_skip):
    tokenized = tokenize(["a <potter> b", "plain", "<potter2>"], tokenizer, [concept])
    with torch.no_grad():
        stack = encode(text_encoder, tokenized, embeddings, layers, clip_skip).states
        assert stack.shape == (3, layers * 77, 32)
        for layer, encoding in enumerate(stack.chunk(layers, dim=1)):
            expected = _by_hand(text_encoder, tokenized, embeddings, layer, clip_skip)
            assert torch.allclose(encoding, expected, atol=1e-5)


def test_a_plain_prompt_is_encoded_once_and_repeated(text_encoder, tokenizer, concept, embeddings, layers):
    batches = []
    hook = text_encoder.register_forward_hook(lambda _module, inputs, _output: batches.append(len(inputs[0])))
    tokenized = tokenize(["a dog", "a cat"], tokenizer, [concept])
    stack = encode(text_encoder, tokenized, embeddings, layers).states
    hook.remove()
    assert batches == [2]
    assert torch.equal(stack, text_encoder(tokenized.ids)[0].repeat(1, layers, 1))


def test_prompts_do_not_touch_each_other(text_encoder, tokenizer, concept, embeddings, layers):
    prompts = ["a <potter>", "a dog", "<potter> and <potter1>", ""]
    together = encode(text_encoder, tokenize(prompts, tokenizer, [concept]), embeddings, layers).states
    for row, prompt in enumerate(prompts):
        alone = encode(text_encoder, tokenize([prompt], tokenizer, [concept]), embeddings, layers).states
        assert torch.allclose(together[row], alone[0], atol=1e-5)


def test_gradients_reach_every_embedding_through_its_own_layer(text_encoder, tokenizer, concept, embeddings, layers):
    tokenized = tokenize(["a <potter> b"], tokenizer, [concept])
    rows = {name: row.requires_grad_() for name, row in embeddings.items()}
    stack = encode(text_encoder, tokenized, rows, layers).states
    stack.chunk(layers, dim=1)[2].square().sum().backward()
    for row in rows.values():
        moved = row.grad.abs().sum(dim=1) > 0
        assert moved.tolist() == [layer == 2 for layer in range(layers)]


def test_the_text_encoder_is_left_alone_also_on_errors(text_encoder, tokenizer, concept, embeddings, layers):
    tokenized = tokenize(["a <potter>"], tokenizer, [concept])
    table = text_encoder.get_input_embeddings()
    encode(text_encoder, tokenized, embeddings, layers)
    assert not table._forward_hooks
    with pytest.raises(IndexError):
        encode(text_encoder, tokenized, embeddings, layers, clip_skip=9)
    assert not table._forward_hooks


def test_bad_embeddings_are_all_named(text_encoder, tokenizer, concept, embeddings, layers):
    tokenized = tokenize(["a <potter>"], tokenizer, [concept])
    with pytest.raises(ConceptError, match=rf"<potter2> has no embedding; <potter1> .*\(3, 32\).*\({layers}, 32\)"):
        encode(text_encoder, tokenized, {"<potter1>": embeddings["<potter1>"][:3]}, layers)


def test_half_precision_encoder_takes_float_embeddings(text_encoder, tokenizer, concept, embeddings, layers):
    tokenized = tokenize(["a <potter>", "b"], tokenizer, [concept])
    stack = encode(text_encoder.to(torch.bfloat16), tokenized, embeddings, layers).states
    assert stack.dtype == torch.bfloat16


@pytest.mark.parametrize("clip_skip", [None, 1])
def test_text_encoders_of_both_transformers_generations(
    text_encoder, tokenizer, concept, embeddings, layers, clip_skip
):
    """Before 5.6 the text model was a child of the class that pipelines hold, since then it is that class itself."""

    class Other(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.text_model = getattr(text_encoder, "text_model", text_encoder)
            self.config = text_encoder.config
            self.get_input_embeddings = text_encoder.get_input_embeddings

        def forward(self, *args, **kwargs):
            return text_encoder(*args, **kwargs)

    tokenized = tokenize(["a <potter>", "b"], tokenizer, [concept])
    expected = encode(text_encoder, tokenized, embeddings, layers, clip_skip).states
    assert torch.equal(encode(Other(), tokenized, embeddings, layers, clip_skip).states, expected)


@pytest.mark.parametrize("clip_skip", [None, 1])
def test_padding_is_masked_where_the_encoder_was_trained_so(
    text_encoder, tokenizer, concept, embeddings, layers, clip_skip
):
    """As diffusers does by the encoder's `use_attention_mask`; padding reads less then, the text itself the same."""
    tokenized = tokenize(["a <potter>", "b"], tokenizer, [concept])
    plain = encode(text_encoder, tokenized, embeddings, layers, clip_skip).states
    text_encoder.config.use_attention_mask = True
    masked = encode(text_encoder, tokenized, embeddings, layers, clip_skip).states
    for row, end in enumerate((tokenized.attention_mask.sum(dim=1) - 1).tolist()):
        one, other = (each[row].unflatten(0, (layers, 77)) for each in (plain, masked))
        assert torch.allclose(one[:, : end + 1], other[:, : end + 1], atol=1e-5)
        assert not torch.allclose(one[:, end + 1 :], other[:, end + 1 :], atol=1e-3)
