"""Adapters as data: in memory, in the folders that hold them, and on the Hugging Face hub."""
