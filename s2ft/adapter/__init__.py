"""Adapters as data: in memory, their formats, the folders that are served, and model cards."""
