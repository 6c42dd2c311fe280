"""Measuring concepts and fused packs: metrics as pure functions of feature matrices, and who computes the features."""
