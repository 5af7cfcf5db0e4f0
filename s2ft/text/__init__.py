"""Language models on disk, prompts and token rows: what training, evaluation, serving and the commands share."""
