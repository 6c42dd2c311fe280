"""The trained parameters of a method by name: their first values, their learning rates, and reading them out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from diffusers_mixofshow.edlora import LowRank
from diffusers_mixofshow.edlora.embeddings import join_name, split_name
from diffusers_mixofshow.errors import ConfigurationError
from diffusers_mixofshow.families import Family, family_of
from diffusers_mixofshow.families.family import POOLED
from diffusers_mixofshow.families.layers import embedding_layers, unread_layers
from diffusers_mixofshow.lora import TrainableLoRA, trainable
from diffusers_mixofshow.training.config import TrainingConfig
from diffusers_mixofshow.training.learner import initialise_embeddings
from diffusers_mixofshow.training.loop import EMBEDDINGS, Phase
from diffusers_mixofshow.training.methods import METHODS
from diffusers_mixofshow.training.start_token import remove_direction, start_token_inputs


if TYPE_CHECKING:
    from diffusers_mixofshow.training.base import TrainablePipeline


@dataclass(frozen=True, kw_only=True)
class Trained:
    """Embeddings and LoRA of the concept while it is trained on a borrowed model.

    Args:
        embeddings: Name in an ED-LoRA's file to parameter, shape (layers, dim), or (1, dim) if all layers share it; in
            that case the embedding for the pooled vector, (1, dim), is the same parameter.
        fixed_tokens: Tokens whose embedding is not trained.
        lora: The LoRA inside the model; None for a method without one.
        whole_matrices: Whether `down` of every update is a fixed identity, so that `up` is a full matrix.
        family: Family of the base model.
        layers: The U-Net's cross-attention layers, or the groups of them that share an embedding.
        kept_inputs: Site name to the direction of an input for which the site's update must be 0, see `keep_inputs`.
    """

    embeddings: Mapping[str, nn.Parameter]
    fixed_tokens: frozenset[str]
    lora: TrainableLoRA | None
    whole_matrices: bool
    family: Family
    layers: tuple[str, ...]
    kept_inputs: Mapping[str, torch.Tensor]

    def parameters(self) -> dict[str, nn.Parameter]:
        """All trainable parameters by name; a checkpoint of one run fits another by these names."""
        found = {f"embedding {name}": rows for name, rows in self._learnt_embeddings().items()}
        return found | dict(self._matrices(lambda site: True))

    def phases(self, config: TrainingConfig) -> list[Phase]:
        """The phases of training: embeddings alone, then everything. A rate of 0 leaves its parameters out."""
        of_embeddings = {
            "name": EMBEDDINGS,
            "params": list(self._learnt_embeddings().values()),
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
        """Copy the present embeddings, with a row for each layer, and the present LoRA to the CPU."""
        embeddings = {
            name: rows.detach().cpu().expand(1 if split_name(name)[0] == POOLED else len(self.layers), -1).clone()
            for name, rows in self.embeddings.items()
        }
        updates = {} if self.lora is None else self.lora.read()
        return embeddings, {s: _shorten(u) for s, u in updates.items()} if self.whole_matrices else updates

    @torch.no_grad()
    def write(self, values: Mapping[str, torch.Tensor]) -> None:
        """Restore the values of `parameters`, from a checkpoint.

        Raises:
            ConfigurationError: If names or shapes differ: they are of another base model or method.
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
        """Project the trained updates so that they are 0 for each of `kept_inputs`; call it after every step."""
        if self.lora is None:
            return
        for site, direction in self.kept_inputs.items():
            layer = self.lora.layers[site]
            meets_input = layer.lora_B if self.whole_matrices else layer.lora_A
            matrix = meets_input[self.lora.adapter_name].weight
            if matrix.requires_grad:
                matrix.copy_(remove_direction(matrix, direction))

    def _learnt_embeddings(self) -> dict[str, nn.Parameter]:
        """The trained embeddings by name; a parameter with several names has only the first one."""
        names = {id(rows): name for name, rows in reversed(list(self.embeddings.items()))}
        return {
            name: rows
            for name, rows in self.embeddings.items()
            if names[id(rows)] == name and split_name(name)[1] not in self.fixed_tokens
        }

    def _matrices(self, wanted: Callable[[str], bool]) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the trained matrices of all sites for whose name `wanted` is true."""
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
            (
                "text_encoder",
                lambda site: site.partition(".")[0] in self.family.text_encoders,
                config.text_encoder_learning_rate,
            ),
            (
                "unet_text_kv",
                self.family.reads_text,
                config.learning_rate if config.text_kv_learning_rate is None else config.text_kv_learning_rate,
            ),
            (
                "unet",
                lambda site: site.startswith(f"{self.family.denoiser}.") and not self.family.reads_text(site),
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
def initialise(pipeline: TrainablePipeline, config: TrainingConfig) -> Iterator[Trained]:
    """Yield the initial parameters of the config's method; its LoRA is in the pipeline's models inside the block.

    The values depend only on the seed; the global random state is unchanged.
    """
    method, concept = METHODS[config.method], config.concept_to_learn
    whole = method.adapts == "text keys and values"
    with ExitStack() as stack:
        lora = None
        if method.adapts != "nothing":
            with torch.random.fork_rng():
                torch.manual_seed(config.seed)
                lora = stack.enter_context(_add_whole_matrices(pipeline) if whole else _add_low_rank(pipeline, config))
        kept = {} if lora is None or not config.keep_start_token else start_token_inputs(pipeline, lora.layers)
        trained = Trained(
            embeddings=_initialise_embeddings(pipeline, config),
            fixed_tokens=frozenset() if method.trains_class else frozenset({concept.tokens[-1]}),
            lora=lora,
            whole_matrices=whole,
            family=family_of(pipeline.components),
            layers=embedding_layers(pipeline.components),
            kept_inputs=kept,
        )
        trained.keep_inputs()
        yield trained


def _initialise_embeddings(pipeline: Any, config: TrainingConfig) -> dict[str, nn.Parameter]:
    """Make initial embeddings for each text encoder, equal for all layers and for the pooled vector."""
    method, components = METHODS[config.method], pipeline.components
    family, generator = family_of(components), torch.Generator().manual_seed(config.seed)
    layers = len(embedding_layers(components)) if method.layerwise else 1
    found: dict[str, nn.Parameter] = {}
    for encoder, reading in family.text_encoders.items():
        start = initialise_embeddings(
            config.concept_to_learn,
            components[reading.tokenizer],
            components[encoder],
            layers=layers,
            std=config.initializer_std,
            generator=generator,
            starts_at_class=method.starts_at_class,
        )
        for part in (part for part, name in family.embedding_parts.items() if name == encoder):
            for token, rows in start.items():
                of_its_own = part == POOLED and method.layerwise
                found[join_name(token, part)] = nn.Parameter(rows.detach()[:1].clone()) if of_its_own else rows
    return found


def _add_low_rank(pipeline: Any, config: TrainingConfig) -> Any:
    unread = unread_layers(pipeline.components)
    return trainable(pipeline.components, config.rank, config.lora_alpha, wanted=lambda site: site not in unread)


@contextmanager
def _add_whole_matrices(pipeline: TrainablePipeline) -> Iterator[TrainableLoRA]:
    """Add full matrices to the text keys and values: a LoRA of full rank whose `down` is the identity."""
    width = pipeline.unet.config.cross_attention_dim
    with trainable(pipeline.components, width, width, wanted=family_of(pipeline.components).reads_text) as lora:
        for layer in lora.layers.values():
            nn.init.eye_(layer.lora_A[lora.adapter_name].weight)
        yield lora


def _shorten(update: LowRank) -> LowRank:
    """Write the same update with the identity on the side where it is smaller, which makes the file smaller."""
    out_features, in_features = update.up.shape
    if out_features >= in_features:
        return update
    return LowRank(down=update.up, up=torch.eye(out_features), alpha=float(out_features))
