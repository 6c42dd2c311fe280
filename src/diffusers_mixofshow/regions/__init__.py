"""Regions and layouts, and their weights on a feature map: where in the picture a prompt holds. Pure geometry."""

from diffusers_mixofshow.regions.draft import Draft
from diffusers_mixofshow.regions.isolation import Isolation
from diffusers_mixofshow.regions.layout import Layout
from diffusers_mixofshow.regions.refinement import Refinement
from diffusers_mixofshow.regions.region import Region
from diffusers_mixofshow.regions.weights import feature_grids, region_weights


__all__ = ["Draft", "Isolation", "Layout", "Refinement", "Region", "feature_grids", "region_weights"]
