"""What a model consists of: its couplings and its weights."""
