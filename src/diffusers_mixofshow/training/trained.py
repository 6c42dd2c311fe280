"""Everything that a method learns, by name: where it is, how it starts, and how it reads as an ED-LoRA."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from diffusers_mixofshow.edlora import LowRank
from diffusers_mixofshow.errors import ConfigurationError
from diffusers_mixofshow.families import Family, family_of
from diffusers_mixofshow.families.layers import cross_attention_layers
from diffusers_mixofshow.lora import TrainableLoRA, trainable
from diffusers_mixofshow.training.config import TrainingConfig
from diffusers_mixofshow.training.learner import initial_embeddings
from diffusers_mixofshow.training.loop import EMBEDDINGS, Phase
from diffusers_mixofshow.training.methods import METHODS
from diffusers_mixofshow.training.start_token import start_token_inputs, without_direction


if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What is learnt, inside and beside a borrowed model.

    Args:
        embeddings: Token to parameter, shape (layers, dim), or (1, dim) where all layers share it.
        fixed_tokens: Tokens whose embedding does not change.
        lora: The updates inside the model; None for a method without.
        whole_matrices: Whether `down` of every update is the identity and stays, so that `up` is a whole matrix.
        family: Whose layers they are.
        layers: The U-Net's cross-attention layers.
        kept_inputs: Site name to the direction of an input at which its update changes nothing, see `keep_inputs`.
    """

    embeddings: Mapping[str, nn.Parameter]
    fixed_tokens: frozenset[str]
    lora: TrainableLoRA | None
    whole_matrices: bool
    family: Family
    layers: tuple[str, ...]
    kept_inputs: Mapping[str, torch.Tensor]

    def parameters(self) -> dict[str, nn.Parameter]:
        """Everything that may change, by a name that is the same in every run."""
        found = {f"embedding {token}": self.embeddings[token] for token in self._learnt_tokens()}
        return found | dict(self._matrices(lambda site: True))

    def phases(self, config: TrainingConfig) -> list[Phase]:
        """Embeddings alone, then everything; a rate of 0 leaves its parameters out."""
        of_embeddings = {
            "name": EMBEDDINGS,
            "params": [self.embeddings[token] for token in self._learnt_tokens()],
            "lr": config.embedding_learning_rate,
            "weight_decay": 0.0,
        }
        joint = [group for group in (of_embeddings, *self._lora_groups(config)) if group["lr"] and group["params"]]
        phases = [
            Phase(name="embeddings", steps=config.embedding_phase_steps, groups=[of_embeddings]),
            Phase(name="joint", steps=config.max_train_steps, groups=joint),
        ]
        return [phase for phase in phases if phase.steps]

    def read(self) -> tuple[dict[str, torch.Tensor], dict[str, LowRank]]:
        """Copy the present embeddings, (layers, dim) each, and updates to the CPU."""
        embeddings = {
            token: value.detach().cpu().expand(len(self.layers), -1).clone()
            for token, value in self.embeddings.items()
        }
        updates = {} if self.lora is None else self.lora.read()
        return embeddings, {s: _shortest(u) for s, u in updates.items()} if self.whole_matrices else updates

    @torch.no_grad()
    def write(self, values: Mapping[str, torch.Tensor]) -> None:
        """Put values of `parameters` back in place.

        Raises:
            ConfigurationError: If they belong to a model or method of other parameters.
        """
        parameters = self.parameters()
        shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
        if shapes != {name: tuple(value.shape) for name, value in values.items()}:
            raise ConfigurationError(
                "The checkpoint does not fit this base model. Go on with the model it was made of."
            )
        for name, parameter in parameters.items():
            parameter.copy_(values[name])

    @torch.no_grad()
    def keep_inputs(self) -> None:
        """Take out of the updates that learn what they change at the inputs to be kept; due after every step."""
        if self.lora is None:
            return
        for site, direction in self.kept_inputs.items():
            layer = self.lora.layers[site]
            meets_input = layer.lora_B if self.whole_matrices else layer.lora_A
            matrix = meets_input[self.lora.adapter_name].weight
            if matrix.requires_grad:
                matrix.copy_(without_direction(matrix, direction))

    def _learnt_tokens(self) -> list[str]:
        return [token for token in self.embeddings if token not in self.fixed_tokens]

    def _matrices(self, wanted: Callable[[str], bool]) -> Iterator[tuple[str, nn.Parameter]]:
        """The matrices that change, of all sites whose name is wanted."""
        if self.lora is None:
            return
        name = self.lora.adapter_name
        for site, layer in self.lora.layers.items():
            if wanted(site):
                if not self.whole_matrices:
                    yield f"{site} down", layer.lora_A[name].weight
                yield f"{site} up", layer.lora_B[name].weight

    def _lora_groups(self, config: TrainingConfig) -> list[dict[str, Any]]:
        rates: list[tuple[str, Callable[[str], bool], float]] = [
            ("text_encoder", lambda site: site.startswith("text_encoder."), config.text_encoder_learning_rate),
            (
                "unet_text_kv",
                self.family.reads_text,
                config.learning_rate if config.text_kv_learning_rate is None else config.text_kv_learning_rate,
            ),
            (
                "unet",
                lambda site: site.startswith("unet.") and not self.family.reads_text(site),
                config.learning_rate,
            ),
        ]
        return [
            {
                "name": name,
                "params": [matrix for _, matrix in self._matrices(wanted)],
                "lr": rate,
                "weight_decay": config.adam_weight_decay,
            }
            for name, wanted, rate in rates
        ]


@contextmanager
def initialise(pipeline: StableDiffusionPipeline, config: TrainingConfig) -> Iterator[Trained]:
    """What the config's method learns, at its start, inside the pipeline's models for the length of the block.

    First values depend on the seed alone; the global random state stays.
    """
    method, concept = METHODS[config.method], config.concept_to_learn
    layers = cross_attention_layers(pipeline.unet)
    embeddings = initial_embeddings(
        concept,
        pipeline.tokenizer,
        pipeline.text_encoder,
        layers=len(layers) if method.layerwise else 1,
        std=config.initializer_std,
        generator=torch.Generator().manual_seed(config.seed),
        starts_at_class=method.starts_at_class,
    )
    whole = method.adapts == "text keys and values"
    with ExitStack() as stack:
        lora = None
        if method.adapts != "nothing":
            with torch.random.fork_rng():
                torch.manual_seed(config.seed)
                lora = stack.enter_context(_whole(pipeline) if whole else _low_rank(pipeline, config))
        kept = {} if lora is None or not config.keep_start_token else start_token_inputs(pipeline, lora.layers)
        trained = Trained(
            embeddings=embeddings,
            fixed_tokens=frozenset() if method.trains_class else frozenset({concept.tokens[-1]}),
            lora=lora,
            whole_matrices=whole,
            family=family_of(pipeline.components),
            layers=layers,
            kept_inputs=kept,
        )
        trained.keep_inputs()
        yield trained


def _low_rank(pipeline: StableDiffusionPipeline, config: TrainingConfig) -> Any:
    return trainable(pipeline.components, config.rank, config.lora_alpha)


@contextmanager
def _whole(pipeline: StableDiffusionPipeline) -> Iterator[TrainableLoRA]:
    """Updates of whole matrices on text keys and values: LoRA of full rank whose `down` is the identity."""
    width = pipeline.unet.config.cross_attention_dim
    with trainable(pipeline.components, width, width, wanted=family_of(pipeline.components).reads_text) as lora:
        for layer in lora.layers.values():
            nn.init.eye_(layer.lora_A[lora.adapter_name].weight)
        yield lora


def _shortest(update: LowRank) -> LowRank:
    """The same change, with the identity on the side where it is smaller."""
    out_features, in_features = update.up.shape
    if out_features >= in_features:
        return update
    return LowRank(down=update.up, up=torch.eye(out_features), alpha=float(out_features))
