"""Slices of several adapters in one linear layer of an inference engine. Nothing here imports vLLM."""
