"""Encode prompts to layer-wise embeddings, and the attention that reads them layer by layer and region by region."""
