"""What a model is made of: its couplings and its weights."""
