"""What transformers, checkpointing, quantizers and torch.compile need from an attached model."""
