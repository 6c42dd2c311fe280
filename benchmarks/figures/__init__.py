"""The tables and sentences of README and docs whose figures are those of `benchmarks/records/`."""
