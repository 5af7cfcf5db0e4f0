"""Training runs: the trainer, its options, checkpoints, loss, and the demo."""
