"""The text tower's training: a small CLIPModel with a vocabulary of its own, and its contrastive objective."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTokenizer

from diffusers_mixofshow.evaluation.clip_judge import image_embeddings, text_embeddings
from diffusers_mixofshow.families.clip import POSITIONS
from diffusers_mixofshow.toyland.scenes import caption, random_scene, residents
from diffusers_mixofshow.toyland.world import Scene

from .reader import attribute_loss


_START, _END = "<|startoftext|>", "<|endoftext|>"
SMALL_WIDTH = 32
"""Channels of the text encoder that the second base and the third have beside the first one's."""
_LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,:;!?'\"-_()<>|/*+=#&%$@~^[]{}\\`"


def write_tokenizer(folder: Path, captions: Iterable[str]) -> CLIPTokenizer:
    """Learn a byte-pair vocabulary from captions and write it as a CLIPTokenizer, with at most 2400 entries learnt.

    Args:
        folder: Gets ``vocab.json``, ``merges.txt`` and ``tokenizer_config.json``.
    """
    tokenizer = Tokenizer(models.BPE(unk_token=_END, end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.BpeTrainer(
        vocab_size=2400, initial_alphabet=list(_LETTERS), end_of_word_suffix="</w>", show_progress=False
    )
    tokenizer.train_from_iterator(captions, trainer)
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    pairs = [tuple(pair) if isinstance(pair, list) else tuple(pair.split(" ")) for pair in merges]
    entries = [*_LETTERS, *(letter + "</w>" for letter in _LETTERS), *("".join(pair) for pair in pairs), _START, _END]
    vocabulary = {entry: index for index, entry in enumerate(dict.fromkeys(entries))}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in pairs)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    configuration = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": POSITIONS,
        "bos_token": _START,
        "eos_token": _END,
        "unk_token": _END,
        "pad_token": _END,
        "do_lower_case": True,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(configuration, indent=2), encoding="utf-8")
    return CLIPTokenizer.from_pretrained(folder)


def sample_captions(count: int, seed: int) -> list[str]:
    """Captions of random scenes with one to three things, and one of every resident."""
    rng = random.Random(seed)
    seeds = [rng.randrange(2**31) for _ in range(count)]
    captions = [
        caption(random_scene(each, things=3 if index % 8 == 0 else None), each) for index, each in enumerate(seeds)
    ]
    return captions + [f"{name} the {thing.class_word}" for name, thing in residents().items()]


def build_clip(tokenizer: CLIPTokenizer) -> CLIPModel:
    """An untrained CLIPModel whose towers have 128 channels and three layers."""
    tower = {
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_attention_heads": 4,
        "num_hidden_layers": 3,
        "projection_dim": 96,
    }
    text = {**tower, **_describe_vocabulary(tokenizer), "max_position_embeddings": POSITIONS}
    vision = {**tower, "image_size": 64, "patch_size": 8}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=96))


def configure_small_encoder(tokenizer: CLIPTokenizer, *, heads: int, ratio: int, **more: Any) -> CLIPTextConfig:
    """The configuration of a text encoder of two layers, whose feed-forward parts are `ratio` times wider inside."""
    return CLIPTextConfig(
        hidden_size=SMALL_WIDTH,
        intermediate_size=ratio * SMALL_WIDTH,
        projection_dim=SMALL_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=heads,
        **_describe_vocabulary(tokenizer),
        **more,
    )


def _describe_vocabulary(tokenizer: CLIPTokenizer) -> dict[str, int]:
    special = {f"{token}_token_id": getattr(tokenizer, f"{token}_token_id") for token in ("bos", "eos", "pad")}
    return {"vocab_size": len(tokenizer), **special}


def tells_looks(words: str, scene: Scene) -> bool:
    """Whether a caption tells all there is to know: it calls the scene's only thing, a resident, by name."""
    return len(scene.things) == 1 and scene.things[0].name != "" and scene.things[0].name in words


class ContrastiveObjective(torch.nn.Module):
    """CLIP's symmetric contrastive loss, where several pairs may say the same, plus reading attributes off both sides.

    Args:
        model: Both towers.
        sizes: Number of values of every attribute.
    """

    def __init__(self, model: CLIPModel, sizes: Sequence[int]) -> None:
        super().__init__()
        self.model = model
        self.head = torch.nn.Linear(model.config.projection_dim, sum(sizes))
        self._sizes = list(sizes)

    def forward(self, batch: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """Loss of pictures (n, 3, 64, 64), token ids (n, length), and labels (n, attributes) of pictures and texts."""
        pixels, token_ids, seen, said = batch
        images = image_embeddings(self.model, pixels)
        texts = text_embeddings(self.model, token_ids)
        similarity = self.model.logit_scale.clamp(max=4.0).exp() * images @ texts.T
        same = (token_ids[:, None] == token_ids[None]).all(dim=-1).float()
        target = same / same.sum(dim=1, keepdim=True)
        cross_entropy = torch.nn.functional.cross_entropy
        contrast = (cross_entropy(similarity, target) + cross_entropy(similarity.T, target)) / 2
        sides = ((images, seen), (texts, said))
        read = [attribute_loss(self.head(10 * side), labels, self._sizes) for side, labels in sides]
        return contrast + torch.stack(read).sum()
