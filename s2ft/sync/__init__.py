"""Slices of a training run, sent to the engine that generates its answers.

The trainer sends absolute numbers of the trained slices, rounded to the engine's dtype: what merging would write. The
engine writes them into its own weights and keeps the originals, so that it can restore the base bit for bit.
"""
