"""Where a prompt holds: boxes and masks, whole layouts, and their weights on a feature grid. Pure geometry."""

from diffusers_mixofshow.regions.isolation import Isolation
from diffusers_mixofshow.regions.layout import Layout
from diffusers_mixofshow.regions.region import Region
from diffusers_mixofshow.regions.weights import feature_grids, region_weights


__all__ = ["Isolation", "Layout", "Region", "feature_grids", "region_weights"]
