"""What the package has to know of a family of base models: the contract that every module of this folder fulfils.

A *site* is a linear layer that a LoRA may adapt. Its name is the component's name in the pipeline, a dot, and
the module's path, e.g. ``unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k`` or
``text_encoder.text_model.encoder.layers.0.self_attn.q_proj``. The names of CLIP's layers always carry ``text_model.``,
whether or not the installed transformers has a module of that name (it is gone since 5.6).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from diffusers_mixofshow.families.original_code import OriginalLayer, with_number, without_number


ANY_SITE = re.compile(r".*")

POOLED = "pooled"
"""What a concept's embeddings for the vector of the whole text are called."""


@dataclass(frozen=True, kw_only=True)
class TextEncoder:
    """A text encoder of a family.

    Args:
        tokenizer: Name of its tokenizer among the pipeline's components.
        adapted: Paths of the layers that an ED-LoRA adapts.
        linear: Paths of the layers that any LoRA may adapt.
        skipped: How many of its last layers the denoiser never sees; ``clip_skip`` counts from there.
        final_norm: Whether its last norm acts on what the denoiser sees.
        pooled: Whether the denoiser reads its projected vector of the whole text besides.
    """

    tokenizer: str
    adapted: re.Pattern[str]
    linear: re.Pattern[str]
    skipped: int = 0
    final_norm: bool = True
    pooled: bool = False


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Layers that fusion records and solves together; earlier stages are fused by then (paper, section 3.3.2).

    Args:
        name: What progress calls it.
        sites: Names of its sites; a site belongs to the first stage that has it.
        text_alone: Whether its layers see nothing but the text, so that one denoising step shows all that they see.
    """

    name: str
    sites: re.Pattern[str]
    text_alone: bool


@dataclass(frozen=True, kw_only=True, eq=False)
class BaseModel:
    """A series of published base models of a family, all of one size.

    Args:
        name: What people call it.
        kohya: What kohya's trainers call it in a file's metadata.
        text_width: Width of the text states that its cross-attention reads; 0 where it has none.
        stream_widths: Widths of the states that the attention of a transformer's blocks reads, one for each size; they
            tell families apart whose layers are called alike.
        embeddings: Name of the text encoder, as files of embeddings spell it, to the width of its embeddings.
        layers: The cross-attention layers in order down, mid, up; empty where it has none.
        id: The base model that is taken where nobody tells; empty where that would be a guess.
        other_ids: What else it is called on the Hub.
        license: Its licence, as the Hub spells it, which that of what is tuned on it must follow; empty where unknown.
        guidance: The guidance scale that it draws well with.
        standing: Top and bottom of a region in which things stand well, as shares of a picture's height.
        classes: Class words of all that it draws, where they can be counted; empty where it draws what people name.
    """

    name: str
    kohya: str
    text_width: int = 0
    stream_widths: tuple[int, ...] = ()
    embeddings: Mapping[str, int] = field(default_factory=dict)
    layers: tuple[str, ...] = ()
    id: str = ""
    other_ids: tuple[str, ...] = ()
    license: str = ""
    guidance: float = 7.5
    standing: tuple[float, float] = (0.1, 1.0)
    classes: tuple[str, ...] = ()

    @property
    def has_two_text_encoders(self) -> bool:
        """Whether it has two, as SDXL; kohya numbers them then, and names the U-Net as the original code does."""
        return len(self.embeddings) > 1


@dataclass(frozen=True, kw_only=True, eq=False)
class Family:
    """Base models whose parts, layers and calls are alike, whatever their sizes.

    A module of this folder makes one of these, and `FAMILIES` lists it; nothing else has to change.
    ``docs/adding_a_family.md`` leads through it, and ``tests/families`` runs every family through the contract.

    Args:
        name: What people call it.
        pipeline: Class of its text-to-image pipeline in diffusers; empty where it has a modular one alone, which
            cannot be recorded here.
        denoiser: Name of the denoising model among the pipeline's components.
        denoiser_class: Class of that model in diffusers.
        concept_pipeline: This package's text-to-image pipeline of it, whose siblings say what they do before
            ``Pipeline``; empty where it has plain LoRAs alone.
        marks: Entries of the denoiser's configuration by which it is known from others of its class.
        unmarked: Arguments of its pipeline that switch off what checks finished pictures or puts marks on them.
        text_encoders: The text encoders that are adapted, by their names among the components, in the order in which
            their sites stand.
        adapted: Paths of the denoiser's layers that an ED-LoRA adapts.
        linear: Paths of the denoiser's layers that any LoRA may adapt.
        blocks: First parts of the denoiser's paths, in the order in which their sites stand; empty where the model's
            own order is right.
        inputs: Layers that read one tensor: a pattern of their names, and what the input is called, as a template for
            `re.Match.expand`. What matches none reads an input of its own.
        stages: The stages of fusion, in order; together they have every site.
        groups: What reports call layers of one kind, to a pattern of their names; the first that fits.
        cross_attention: What the denoiser's cross-attention modules are called, to which layer-wise embeddings belong;
            empty where it has none.
        embedding_groups: Cross-attention modules that share a layer-wise embedding: a pattern of their paths, and what
            they are called together, as a template. None where each has its own.
        self_attention: What its self-attention modules are called.
        sampler: Class of diffusers' scheduler that shows a model's features in few steps; empty: its own.
        guidance_argument: What the pipeline calls the strength of guidance.
        guidance_off: The strength at which, and below, nothing is guided: one half is drawn instead of two.
        takes_negative_prompt: Whether the pipeline takes negative prompts, and draws a half for them.
        models: Its published base models.
        original: What its original code calls the denoiser's layers, with ``N`` for the number of the block.
        also_called: What else files call some of these layers, or parts of them, likewise; it is read and not written.
        shared_names: The names under which ComfyUI and diffusers both load LoRAs of a transformer: a prefix, and
            ``{original}`` or ``{path}``, as the original code or as diffusers calls the layer; dots become underscores
            after a prefix of kohya's. Empty for a U-Net, whose names are kohya's.
    """

    name: str
    pipeline: str
    denoiser: str
    denoiser_class: str
    text_encoders: Mapping[str, TextEncoder]
    adapted: re.Pattern[str]
    linear: re.Pattern[str]
    inputs: Sequence[tuple[re.Pattern[str], str]]
    stages: tuple[Stage, ...]
    groups: Mapping[str, re.Pattern[str]]
    models: tuple[BaseModel, ...]
    concept_pipeline: str = ""
    marks: Mapping[str, object] = field(default_factory=dict)
    unmarked: Mapping[str, object] = field(default_factory=dict)
    blocks: tuple[str, ...] = ()
    cross_attention: str = ""
    embedding_groups: tuple[re.Pattern[str], str] | None = None
    self_attention: str = ""
    sampler: str = ""
    guidance_argument: str = "guidance_scale"
    guidance_off: float = 1.0
    takes_negative_prompt: bool = True
    original: Mapping[str, OriginalLayer] = field(default_factory=dict)
    also_called: Mapping[str, OriginalLayer] = field(default_factory=dict)
    shared_names: str = ""

    @property
    def components(self) -> tuple[str, ...]:
        """Names of the components whose layers are adapted: text encoders, then the denoiser."""
        return (*self.text_encoders, self.denoiser)

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the components without which its pipeline draws nothing."""
        tokenizers = (encoder.tokenizer for encoder in self.text_encoders.values())
        return (self.denoiser, *self.text_encoders, *tokenizers, "vae", "scheduler")

    @property
    def embedding_parts(self) -> dict[str, str]:
        """What a concept's token has embeddings for, to the text encoder that reads them.

        The first text encoder is the empty string, a further one its own name, the vector of the whole text `POOLED`.
        """
        parts = {"" if number == 0 else name: name for number, name in enumerate(self.text_encoders)}
        for name, encoder in self.text_encoders.items():
            if encoder.pooled:
                parts[POOLED] = name
        return parts

    def embedding_layer_of(self, path: str) -> str:
        """What a cross-attention module of the denoiser shares its layer-wise embedding with: a group, or itself."""
        pattern, template = self.embedding_groups or (ANY_SITE, r"\g<0>")
        match = pattern.fullmatch(path)
        return match.expand(template) if match else path

    def has_site(self, site: str) -> bool:
        """Whether a site has the name of a layer that a LoRA may adapt."""
        component, _, path = site.partition(".")
        if component == self.denoiser:
            known_block = not self.blocks or path.partition(".")[0] in self.blocks
            return known_block and self.linear.fullmatch(path) is not None
        encoder = self.text_encoders.get(component)
        return encoder is not None and encoder.linear.fullmatch(path) is not None

    def original_layer(self, path: str) -> OriginalLayer | None:
        """The layer that the original code calls so, with the number of its block; None if it has none."""
        name, number = without_number(path)
        layer = self.original.get(name) or self.also_called.get(name)
        return layer and replace(layer, paths=tuple(with_number(each, number) for each in layer.paths))

    def original_name(self, path: str) -> str:
        """What the original code calls the layer that has, or is, one of diffusers'; empty where it has none."""
        ours, number = without_number(path)
        name = next((name for name, layer in self.original.items() if ours in layer.paths), "")
        return with_number(name, number)

    def input_of(self, site: str) -> str:
        """Name the input that a layer reads, the same for all layers that read the same tensor.

        Args:
            site: A layer's name.

        Returns:
            E.g. ``....attn1.to_q+to_k+to_v``, ``....attn2.to_k+to_v``, ``....self_attn.q_proj+k_proj+v_proj``, or the
            site's own name.
        """
        for pattern, template in self.inputs:
            if match := pattern.fullmatch(site):
                return match.expand(template)
        return site

    def by_input(self, sites: Iterable[str]) -> dict[str, tuple[str, ...]]:
        """Group layers by the input that they read: name of the input to its layers."""
        groups: dict[str, list[str]] = {}
        for site in sites:
            groups.setdefault(self.input_of(site), []).append(site)
        return {name: tuple(group) for name, group in groups.items()}

    def stage_of(self, site: str) -> Stage:
        """The stage of fusion that a layer belongs to."""
        return next(stage for stage in self.stages if stage.sites.fullmatch(site))

    def group_of(self, site: str) -> str:
        """What reports call layers of its kind."""
        return next(group for group, pattern in self.groups.items() if pattern.fullmatch(site))

    def reads_text(self, site: str) -> bool:
        """Whether a site of the denoiser sees the text alone: in a U-Net, the keys and values of cross-attention."""
        return site.startswith(f"{self.denoiser}.") and self.stage_of(site).text_alone

    def place_of(self, path: str) -> int:
        """Sort key of a path in the denoiser: the place of its block."""
        return self.blocks.index(path.partition(".")[0]) if self.blocks else 0
