"""ComposLoRA (arXiv:2402.16843), the benchmark of composing plain LoRAs: see README.md."""
