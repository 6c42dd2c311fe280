"""Description of a family of base models: the contract that every module of this folder fulfils.

A *site* is a linear layer that a LoRA may adapt. Its name is the component's name in the pipeline, a dot, and
the module's path, e.g. ``unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k`` or
``text_encoder.text_model.encoder.layers.0.self_attn.q_proj``. Site names of CLIP layers always contain
``text_model.``, although transformers 5.6 and later have no module of that name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from diffusers_mixofshow.families.original_code import OriginalLayer, insert_block_number, strip_block_number


ANY_SITE = re.compile(r".*")

POOLED = "pooled"
"""Name of a concept's embeddings for the pooled vector of the whole text."""


@dataclass(frozen=True, kw_only=True)
class TextEncoder:
    """A text encoder of a family.

    Args:
        tokenizer: Name of its tokenizer among the pipeline's components.
        adapted: Paths of the layers that an ED-LoRA adapts.
        linear: Paths of the layers that any LoRA may adapt.
        skipped: How many of its last layers the denoiser does not use; ``clip_skip`` counts from there.
        final_norm: Whether its last norm is applied to the states that the denoiser reads.
        pooled: Whether the denoiser also reads its pooled, projected vector of the whole text.
    """

    tokenizer: str
    adapted: re.Pattern[str]
    linear: re.Pattern[str]
    skipped: int = 0
    final_norm: bool = True
    pooled: bool = False


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Layers that fusion records and solves together, after fusing the earlier stages (paper, section 3.3.2).

    Args:
        name: Label in progress bars.
        sites: Pattern of its sites; a site belongs to the first stage that matches.
        text_alone: Whether its inputs depend on the text alone, so that one denoising step records all of them.
    """

    name: str
    sites: re.Pattern[str]
    text_alone: bool


@dataclass(frozen=True, kw_only=True, eq=False)
class BaseModel:
    """Published base models of a family with the same layers and sizes.

    Args:
        name: Display name.
        kohya: Its name in the metadata of kohya's trainers.
        text_width: Width of the text states that its cross-attention reads; 0 without cross-attention.
        stream_widths: For transformers, width of the attention's input for each model size; distinguishes families
            with the same layer names.
        embeddings: Name of a text encoder in files of embeddings to the width of its embeddings.
        layers: The cross-attention layers in order down, mid, up; empty without cross-attention.
        id: Hub id of the default base model; empty if there is no obvious one.
        other_ids: Other Hub ids of the same model.
        linear_projections: Whether its U-Net's ``proj_in`` and ``proj_out`` are linear layers, not 1 x 1 convolutions.
        license: Its licence, as the Hub spells it, inherited by models tuned on it; empty if unknown.
        guidance: Recommended guidance scale.
        resolution: Side in pixels of the pictures that it draws by default; 0 if only its configuration tells.
        least_resolution: Side in pixels of training pictures, below which too much of what it draws is lost.
        standing: Recommended top and bottom of a region for one object, as shares of the picture's height.
        classes: Class words of everything it can draw; empty for a model of open vocabulary.
    """

    name: str
    kohya: str
    text_width: int = 0
    stream_widths: tuple[int, ...] = ()
    embeddings: Mapping[str, int] = field(default_factory=dict)
    layers: tuple[str, ...] = ()
    id: str = ""
    other_ids: tuple[str, ...] = ()
    linear_projections: bool = False
    license: str = ""
    guidance: float = 7.5
    resolution: int = 0
    least_resolution: int = 512
    standing: tuple[float, float] = (0.1, 1.0)
    classes: tuple[str, ...] = ()

    @property
    def has_two_text_encoders(self) -> bool:
        """Whether it has two, as SDXL; kohya's names then number them and use the original code's U-Net names."""
        return len(self.embeddings) > 1


@dataclass(frozen=True, kw_only=True, eq=False)
class Family:
    """Base models with the same components, layer names and pipeline arguments, of any size.

    A module of this folder makes one of these, and `FAMILIES` lists it; nothing else has to change.
    ``docs/adding_a_family.md`` leads through it, and ``tests/families`` runs every family through the contract.

    Args:
        name: Display name.
        pipeline: Class of its text-to-image pipeline in diffusers; empty if diffusers has only a modular one, which
            fusion cannot record.
        denoiser: Name of the denoising model among the pipeline's components.
        denoiser_class: Class of that model in diffusers.
        concept_pipeline: This package's text-to-image pipeline class for it; variants insert their task before
            ``Pipeline``. Empty if only plain LoRAs are supported.
        marks: Entries of the denoiser's configuration that distinguish it from other families with the same class.
        unmarked: Arguments of its pipeline that switch off safety checkers and watermarks.
        text_encoders: The adapted text encoders by component name, in the order of their sites.
        adapted: Paths of the denoiser's layers that an ED-LoRA adapts.
        linear: Paths of the denoiser's layers that any LoRA may adapt.
        blocks: First parts of the denoiser's module paths, in the order of their sites; empty if the model's own order
            is right.
        inputs: Layers that share an input: a pattern of their names, and the input's name as a template for
            `re.Match.expand`. A layer that matches no pattern has an input of its own.
        stages: The stages of fusion, in order; together they match every site.
        groups: Label in reports to a pattern of site names; the first match counts.
        cross_attention: Name of the denoiser's cross-attention modules, which layer-wise embeddings belong to; empty
            without cross-attention.
        embedding_groups: Cross-attention modules that share a layer-wise embedding: a pattern of their paths, and the
            group's name as a template. None if each has its own.
        self_attention: Name of the denoiser's self-attention modules.
        sampler: Class of the diffusers scheduler to record with in few steps; empty: the pipeline's own.
        guidance_argument: Name of the pipeline's argument for the guidance scale.
        guidance_off: Up to this guidance scale, only the conditional half is computed.
        guidance_learnt: Whether the denoiser reads the guidance scale as a number; no other half is computed then.
        takes_negative_prompt: Whether the pipeline accepts negative prompts.
        models: Its published base models.
        original: Name of a layer in the model's original code, with ``N`` for the block's number, to the layer.
        also_called: Further names of these layers, or of parts of them, in files; read but never written.
        shared_names: Template of the names under which both ComfyUI and diffusers load LoRAs of a transformer: a
            prefix, then ``{original}`` or ``{path}``, the layer's name in the original code or in diffusers. After a
            prefix of kohya's, dots become underscores. Empty for a U-Net, which uses kohya's names.
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
    guidance_learnt: bool = False
    takes_negative_prompt: bool = True
    original: Mapping[str, OriginalLayer] = field(default_factory=dict)
    also_called: Mapping[str, OriginalLayer] = field(default_factory=dict)
    shared_names: str = ""

    def count_halves(self, guidance: float) -> int:
        """How many rows of the denoiser's batch a picture takes at a guidance scale."""
        return 2 if guidance > self.guidance_off and not self.guidance_learnt else 1

    @property
    def components(self) -> tuple[str, ...]:
        """Names of the components whose layers are adapted: text encoders, then the denoiser."""
        return (*self.text_encoders, self.denoiser)

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the components that its pipeline requires."""
        tokenizers = (encoder.tokenizer for encoder in self.text_encoders.values())
        return (self.denoiser, *self.text_encoders, *tokenizers, "vae", "scheduler")

    @property
    def embedding_parts(self) -> dict[str, str]:
        """Kinds of embeddings of a concept's token, to the text encoder that reads them.

        The kind is the empty string for the first text encoder, the component's name for a further one, and `POOLED`
        for the pooled vector of the whole text.
        """
        parts = {"" if number == 0 else name: name for number, name in enumerate(self.text_encoders)}
        for name, encoder in self.text_encoders.items():
            if encoder.pooled:
                parts[POOLED] = name
        return parts

    def embedding_layer_of(self, path: str) -> str:
        """Name of the group that shares a cross-attention module's layer-wise embedding; by default its own path."""
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
        """The layer with this name in the original code, block number filled in; None if there is none."""
        name, number = strip_block_number(path)
        layer = self.original.get(name) or self.also_called.get(name)
        return layer and replace(layer, paths=tuple(insert_block_number(each, number) for each in layer.paths))

    def original_name(self, path: str) -> str:
        """Name in the original code of the layer that contains a diffusers layer; empty if there is none."""
        ours, number = strip_block_number(path)
        name = next((name for name, layer in self.original.items() if ours in layer.paths), "")
        return insert_block_number(name, number)

    def input_of(self, site: str) -> str:
        """Name of the input that a layer reads; layers that read the same tensor share it.

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
        """Group layers by input: input name to layers."""
        groups: dict[str, list[str]] = {}
        for site in sites:
            groups.setdefault(self.input_of(site), []).append(site)
        return {name: tuple(group) for name, group in groups.items()}

    def stage_of(self, site: str) -> Stage:
        """The stage of fusion that a layer belongs to."""
        return next(stage for stage in self.stages if stage.sites.fullmatch(site))

    def group_of(self, site: str) -> str:
        """Label in reports of layers of its kind."""
        return next(group for group, pattern in self.groups.items() if pattern.fullmatch(site))

    def reads_text(self, site: str) -> bool:
        """Whether a denoiser layer's input is the text alone: in a U-Net, the keys and values of cross-attention."""
        return site.startswith(f"{self.denoiser}.") and self.stage_of(site).text_alone

    def block_index(self, path: str) -> int:
        """Sort key of a path in the denoiser: the index of its block."""
        return self.blocks.index(path.partition(".")[0]) if self.blocks else 0
