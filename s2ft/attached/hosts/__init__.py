"""Adaptations of an attached model to transformers, gradient checkpointing, quantizers and torch.compile."""
