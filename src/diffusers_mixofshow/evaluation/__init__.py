"""Measure concepts and fused packs: metrics as pure functions of features, and the models that compute features."""
