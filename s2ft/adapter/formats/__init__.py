"""File formats of adapters: one file each."""
