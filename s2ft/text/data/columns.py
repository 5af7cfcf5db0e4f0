"""Columns that hold any value as JSON, and give back exactly what was stored."""

import json
from typing import Any

from datasets import Value


class ExactJson(Value):
    """A column of JSON, stored as text: ``ExactJson("string")``.

    datasets has Json for this. It reads some floats with another last digit, and stores no whole number of more than 64
    bits.
    """

    def decode_example(self, value: str | None, token_per_repo_id: dict | None = None) -> Any:
        """Return the stored value."""
        return None if value is None else json.loads(value)
