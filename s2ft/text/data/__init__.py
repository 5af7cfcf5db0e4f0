"""Data for training and evaluation: where it is read from, and the forms of its rows."""

from s2ft.text.data.data_options import DataOptions
from s2ft.text.data.rows import form_of, load_rows, load_split

__all__ = ["DataOptions", "form_of", "load_rows", "load_split"]
