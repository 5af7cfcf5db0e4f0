"""report.html: a run on one page that needs no server. Readable on a phone, and in the dark."""

import io
import platform
from collections.abc import Mapping
from html import escape
from importlib.metadata import version
from typing import Any

from s2ft.text.comparison import Comparison

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>
:root {{ color-scheme: light dark; --line: #8885; --mark: #0a7d6c }}
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 52rem; margin: 0 auto; padding: 1rem }}
h1 {{ font-size: 1.4rem; overflow-wrap: anywhere }} h2 {{ font-size: 1.1rem; margin-top: 2rem }}
.loss {{ font-size: 2rem }} .loss b {{ color: var(--mark) }}
table {{ border-collapse: collapse; width: 100% }}
td {{ border-top: 1px solid var(--line); padding: .3rem .6rem .3rem 0; vertical-align: top; overflow-wrap: anywhere }}
td:first-child {{ white-space: nowrap; opacity: .7 }}
pre {{ white-space: pre-wrap; overflow-wrap: anywhere; border: 1px solid var(--line); padding: .6rem }}
svg {{ width: 100%; height: auto }}
@media (prefers-color-scheme: dark) {{ svg {{ filter: invert(1) hue-rotate(180deg) }} }}
</style></head><body><h1>{title}</h1>
{body}
</body></html>
"""
PACKAGES = ("torch", "transformers", "trl", "s2ft")


def report_page(
    title: str, facts: Mapping[str, Any], commands: list[str], comparison: Comparison | None = None, figure: Any = None
) -> str:
    """Write a run as one HTML page.

    Args:
        title: The heading.
        facts: What is known of the run, by name. Entries that are None are left out.
        commands: What to do next, as lines for a terminal.
        comparison: The base and the adapter on held-out rows, or None.
        figure: A figure of matplotlib, or None.

    Returns:
        The page.

    Example:
        >>> from s2ft.train.report_page import report_page
        >>> "<td>3</td>" in report_page("my run", {"updates": 3}, ["s2ft chat --adapter my-run"])
        True
    """
    parts = []
    if comparison is not None and comparison.loss_before is not None:
        before, after = comparison.loss_before, comparison.loss_after
        parts.append(f"<p class=loss>loss {before:.3f} → <b>{after:.3f}</b></p>")
        parts.append(f"<p>on {comparison.rows} rows that were not trained on, before and after</p>")
    if figure is not None:
        parts.append(_picture(figure))
    for one in comparison.samples if comparison is not None else ():
        rows = {"right": one.right, "base": one.base, "tuned": one.tuned}
        parts.append(f"<h2>{escape(one.prompt[-300:])}</h2>{_table(rows)}")
    parts.append(f"<h2>Next</h2><pre>{escape(chr(10).join(commands))}</pre>")
    versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    machine = f"{platform.machine()}, Python {platform.python_version()}, {versions}"
    parts.append(f"<h2>The run</h2>{_table({**facts, 'machine': machine})}")
    return PAGE.format(title=escape(title), body="\n".join(parts))


def _table(rows: Mapping[str, Any]) -> str:
    cells = (f"<tr><td>{escape(name)}</td><td>{escape(str(value))}</td></tr>" for name, value in rows.items())
    return f"<table>{''.join(cells)}</table>"


def _picture(figure: Any) -> str:
    text = io.StringIO()
    figure.savefig(text, format="svg", transparent=True)
    return text.getvalue().partition("?>")[2].partition("<svg")[1] + text.getvalue().partition("<svg")[2]
