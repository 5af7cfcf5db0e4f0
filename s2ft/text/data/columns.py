"""Columns that hold any value as JSON, and give back exactly what was stored."""

import json
import re
import secrets
from typing import Any

from datasets import Features, Json

from s2ft.text.data.forms import BadRow
from s2ft.text.data.rows import FEW
from s2ft.text.prompts import PromptFormat

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


def with_columns(rows, prompt: PromptFormat):
    """Return rows of PROMPTS as TRL's GRPOTrainer takes them: with the fields for the rewards as columns.

    Args:
        rows: A Dataset as :func:`s2ft.text.data.load_rows` returns it.
        prompt: The format of prompts. With form "chat" every prompt becomes a list of messages.

    Returns:
        A Dataset with the column `prompt` and one for each field. A field that a row lacks is None.

    Raises:
        ValueError: A prompt is a chat, but the form is "text".
    """
    names = list(dict.fromkeys(name for batch in rows.iter(FEW) for columns in batch["columns"] for name in columns))

    def spread(row: dict[str, Any]) -> dict[str, Any]:
        found = row["prompt"]
        if prompt.form == "chat":
            found = prompt.conversation([{"role": "user", "content": found}] if isinstance(found, str) else found)
        elif not isinstance(found, str):
            raise ValueError(f"{row['place']}: messages need a chat template, but form='text' uses none")
        values = {"prompt": found, **{name: row["columns"].get(name) for name in names}}
        return {name: json.dumps(value) for name, value in values.items()}  # else the text "5" would become a number

    return rows.map(
        spread,
        remove_columns=rows.column_names,
        features=Features({name: ExactJson() for name in ("prompt", *names)}),
        new_fingerprint=secrets.token_hex(8),
    )
