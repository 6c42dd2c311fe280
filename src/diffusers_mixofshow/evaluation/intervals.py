"""How sure a mean is: its 95 % interval by drawing the measured values again and again (percentile bootstrap)."""

from __future__ import annotations

from collections.abc import Sequence

import torch


Interval = dict[str, float]
"""``mean``, ``low``, ``high``, rounded to four digits, and ``count``, the number of values."""

RESAMPLES = 2000
"""How often values are drawn again."""


def mean_with_interval(values: Sequence[float], *, resamples: int = RESAMPLES) -> Interval:
    """Mean, and the 95 % interval of means of as many values drawn from these (percentile bootstrap, one seed).

    Args:
        values: One for each independent picture.
        resamples: How often values are drawn.

    Returns:
        Of values that are all the same the interval is that value: no more can be said without a model of what was
        not seen.
    """
    return _summarise(_mean(values), _draw_means(values, (resamples,), _seeded()), len(values))


def mean_of_groups_with_interval(groups: Sequence[Sequence[float]], *, resamples: int = RESAMPLES) -> Interval:
    """Mean over groups of their means, with its 95 % interval over groups and over the values in them.

    As many groups are drawn as there are, and of each drawn group as many values as it has. So the interval says both
    what other concepts and what other pictures of them may change.

    Args:
        groups: The values of each group, such as one for each picture of a concept.
        resamples: How often groups are drawn.
    """
    random, count = _seeded(), len(groups)
    chosen = torch.randint(count, (resamples, count), generator=random)
    # (groups, resamples, count): the mean of a group for each time that it may be drawn
    means = torch.stack([_draw_means(values, (resamples, count), random) for values in groups])
    drawn = means.gather(0, chosen[None])[0].mean(dim=1)  # (resamples,)
    return _summarise(_mean([_mean(values) for values in groups]), drawn, sum(map(len, groups)))


def _mean(values: Sequence[float]) -> float:
    return torch.tensor(values, dtype=torch.float64).mean().item()


def _draw_means(values: Sequence[float], shape: tuple[int, ...], random: torch.Generator) -> torch.Tensor:
    """Means of as many values as there are, drawn from them, float64 of the given shape."""
    numbers = torch.tensor(values, dtype=torch.float64)
    return numbers[torch.randint(len(numbers), (*shape, len(numbers)), generator=random)].mean(dim=-1)


def _seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _summarise(mean: float, drawn: torch.Tensor, count: int) -> Interval:
    low, high = drawn.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return {"mean": round(mean, 4), "low": round(low, 4), "high": round(high, 4), "count": count}
