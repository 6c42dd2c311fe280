"""The layers of an input are solved alike from low-rank factors and from the matrices that these stand for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import pytest
import torch

from diffusers_mixofshow.edlora import EDLoRA, LowRank
from diffusers_mixofshow.edlora.low_rank import low_rank_delta
from diffusers_mixofshow.errors import FusionError
from diffusers_mixofshow.families.flux1 import FLUX1
from diffusers_mixofshow.fusion.gram import DenseGram, Gram, GramFactor
from diffusers_mixofshow.fusion.solvers import Factors, relative_residual
from diffusers_mixofshow.fusion.solving import MEASURED, Method, Settings, Solution, solve
from diffusers_mixofshow.fusion.sources import Source
from diffusers_mixofshow.fusion.statistics import GramStatistics, Part


WIDTH, OUT = 300, 24
SITES = [f"transformer.transformer_blocks.0.attn.to_{name}" for name in ("q", "k", "v")]
INPUT = FLUX1.input_of(SITES[0])
SITES_OF_MANY_INPUTS = [f"transformer.transformer_blocks.{block}.attn.to_q" for block in range(8)]
WEIGHTS = {"style": 1.0, "ink": 3.0, "wash": 0.5}
KEPT = {"style": 70, "ink": 40, "wash": 90}
"""Rows of each factor; together more than are multiplied at once."""


class Given(GramStatistics):
    """Statistics that are one given matrix."""

    def __init__(self, gram: Gram) -> None:
        self._gram = gram

    @property
    def counts(self) -> Mapping[tuple[str, Part], int]:
        return {(FLUX1.input_of(site), "fit"): 10 for site in (*SITES, *SITES_OF_MANY_INPUTS)}

    def read(self, name: str, parts: Sequence[Part]) -> list[Gram]:
        return [self._gram for _ in parts]


def _random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _source(name: str, rank: int, sites: Sequence[str] = SITES) -> Source:
    lora = {
        site: LowRank(
            down=_random(rank, WIDTH, seed=10 * rank + number).float(),
            up=_random(OUT, rank, seed=100 * rank + number).half(),
            alpha=2.0 * rank,
        )
        for number, site in enumerate(sites)
    }
    edlora = EDLoRA(concepts=(), embeddings={}, lora=lora, base_model="", layers=())
    return Source(edlora=edlora, prompts={name: ("a picture",)}, weight=WEIGHTS[name])


def _solve(grams: Sequence[Gram], prior: Gram | None, settings: Settings) -> Solution:
    sources = [_source(name, rank) for rank, name in enumerate(WEIGHTS, 2)]
    statistics = [[Given(gram)] for gram in grams]
    return solve(sources, statistics, SITES, settings, prior={} if prior is None else {INPUT: prior})


@pytest.mark.parametrize("method", MEASURED)
@pytest.mark.parametrize("max_rank", [None, 4])
@pytest.mark.parametrize("with_prior", [False, True])
def test_factors_are_solved_as_the_matrices_that_they_stand_for(
    method: Method, max_rank: int | None, with_prior: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diffusers_mixofshow.fusion.team.WIDEST_MATRIX", 0)
    *grams, prior = (
        GramFactor(rows=_random(kept, WIDTH, seed=kept), tail=0.01 * kept) for kept in (*KEPT.values(), 30)
    )
    settings = Settings(method=method, max_rank=max_rank, ridge=0.1)
    found = _solve(grams, prior if with_prior else None, settings)
    expected = _solve(
        [DenseGram(gram.matrix()) for gram in grams], DenseGram(prior.matrix()) if with_prior else None, settings
    )
    for site in SITES:
        fused, whole = low_rank_delta(found.lora[site]), low_rank_delta(expected.lora[site])
        torch.testing.assert_close(fused, whole, rtol=1e-3, atol=1e-5)
        for name, gram in zip(WEIGHTS, grams, strict=True):
            assert found.residuals[site][name] == pytest.approx(expected.residuals[site][name], rel=1e-5)
            own = Factors.of(_source(name, list(WEIGHTS).index(name) + 2).edlora.lora[site])
            direct = relative_residual(Factors.of(found.lora[site]), own, DenseGram(gram.matrix()))
            assert found.residuals[site][name][1] == pytest.approx(direct, rel=1e-5)
    assert found.overlaps == pytest.approx(expected.overlaps, rel=1e-6)


@pytest.fixture
def two_threads() -> Iterator[None]:
    """Two threads of torch, whatever the machine has."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def _solve_many_inputs(gram: Gram) -> Solution:
    sources = [_source(name, rank, SITES_OF_MANY_INPUTS) for rank, name in enumerate(WEIGHTS, 2)]
    return solve(sources, [[Given(gram)] for _ in sources], SITES_OF_MANY_INPUTS, Settings(ridge=0.1))


def test_inputs_that_are_solved_at_once_are_solved_as_one_by_one(two_threads: None) -> None:
    gram = GramFactor(rows=_random(70, WIDTH, seed=1), tail=0.1)
    at_once = _solve_many_inputs(gram)
    assert torch.get_num_threads() == 2
    torch.set_num_threads(1)
    one_by_one = _solve_many_inputs(gram)
    assert list(at_once.lora) == list(one_by_one.lora) == SITES_OF_MANY_INPUTS
    for site in SITES_OF_MANY_INPUTS:
        assert torch.equal(at_once.lora[site].down, one_by_one.lora[site].down)
    assert at_once.residuals == one_by_one.residuals
    assert at_once.overlaps == one_by_one.overlaps
    assert at_once.inputs == one_by_one.inputs == len(SITES_OF_MANY_INPUTS)


def test_an_input_that_cannot_be_solved_leaves_the_threads_as_they_were(two_threads: None) -> None:
    with pytest.raises(FusionError, match=f"must be .*{WIDTH}.*got style .*{WIDTH + 1}"):
        _solve_many_inputs(GramFactor(rows=_random(70, WIDTH + 1, seed=1), tail=0.1))
    assert torch.get_num_threads() == 2
