"""Data, prompts, training and evaluation: what the `s2ft` command is made of."""
