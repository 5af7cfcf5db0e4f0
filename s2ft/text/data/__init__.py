"""Data for training and evaluation: where it is read from, and the forms of its rows."""

from s2ft.text.data.loading import form_of, load_rows, load_split
from s2ft.text.data.options import DataOptions

__all__ = ["DataOptions", "form_of", "load_rows", "load_split"]
