"""Columns that hold any value as JSON, and give back exactly what was stored."""

import json
import re
from typing import Any

from datasets import Json

from s2ft.text.data.forms import BadRow

LONG_NUMBER = re.compile(r"\d{19}")  # whole numbers of 64 bits have at least so many digits


class ExactJson(Json):
    """A column of JSON. The decoder of datasets reads some floats with another last digit."""

    def decode_example(self, example_data: str | None, token_per_repo_id: dict | None = None) -> Any:
        """Return the stored value."""
        return None if example_data is None else json.loads(example_data)


def as_json(value: Any) -> str | None:
    """Return a value as it is stored. A text is written as JSON too, or "5" would be a number.

    Raises:
        BadRow: The value has a whole number that datasets can't store.

    Example:
        >>> from s2ft.text.data.columns import as_json
        >>> as_json("5"), as_json([{"a": 0.1}])
        ('"5"', '[{"a": 0.1}]')
    """
    if value is None:
        return None
    text = json.dumps(value)
    if LONG_NUMBER.search(text):
        from datasets.utils.json import ujson_loads

        try:
            ujson_loads(text)
        except ValueError:
            raise BadRow("a whole number has more than 64 bits") from None
    return text
