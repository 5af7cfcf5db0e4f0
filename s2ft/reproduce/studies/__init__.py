"""Kinds of experiments. Each file defines one as KIND; a recipe names the file."""
