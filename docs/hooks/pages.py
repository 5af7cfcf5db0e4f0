"""Hook of mkdocs: adds the pages that are made from the code, and fails if a public name is not documented.

The pages are reference/*.md, cli.md, supported-models.md, model-types.md, what-ran-where.md, changelog.md and, from
CONTRIBUTING.md, contributing.md. They are never written to the repository.
"""

import logging
import os
import posixpath
import re
from pathlib import Path
from typing import Any

import command_pages
import model_pages
import public_api
import suite_page
import type_pages
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
LINK = re.compile(r"\]\((?!https?://|#|mailto:)([^)\s#]+)(#[^)\s]*)?\)")
logger = logging.getLogger("mkdocs.s2ft")


def on_pre_build(config: Any, **_: Any) -> None:
    """Check the docstrings of the public names. S2FT_DOCS_INCOMPLETE=1 turns the error into a warning.

    Raises:
        PluginError: A public name is not documented in full, or no page of the reference has it.
    """
    total, complete, lines = public_api.report()
    lines += [
        f"{name}: on no page of the reference (docs/hooks/public_api.py, GROUPS)" for name in public_api.ungrouped()
    ]
    text = f"{complete} of {total} public names are documented in full"
    if not lines:
        logger.info(text)
    elif os.environ.get("S2FT_DOCS_INCOMPLETE") == "1":
        logger.info(f"{text}; python docs/hooks/public_api.py lists what is missing")
    else:
        raise PluginError("\n".join([text, *lines]))


def on_files(files: Files, config: Any, **_: Any) -> Files:
    """Add the generated pages."""
    repository = f"{config.repo_url.rstrip('/')}/blob/main"
    for path, text in generated(repository).items():
        if files.get_file_from_path(path) is None:
            files.append(File.generated(config, path, content=text))
    return files


def generated(repository: str) -> dict[str, str]:
    """The text of every generated page, by its path.

    Args:
        repository: Address of the files of the repository.
    """
    pages = {f"reference/{group.page}.md": reference(group, repository) for group in public_api.GROUPS}
    pages["reference/index.md"] = index()
    pages["cli.md"] = command_pages.page()
    pages["supported-models.md"] = model_pages.page()
    pages["model-types.md"] = type_pages.page()
    pages["what-ran-where.md"] = suite_page.page()
    pages["changelog.md"] = relinked("CHANGELOG.md", repository)
    if (ROOT / "CONTRIBUTING.md").is_file():
        pages["contributing.md"] = relinked("CONTRIBUTING.md", repository)
    return pages


def index() -> str:
    """The list of the reference's pages, with the names on each."""
    rows = [f"| [{group.title}]({group.page}.md) | {', '.join(link(group, name) for name in group.names)} |"
            for group in public_api.GROUPS]  # fmt: skip
    return "\n".join(["# Reference", "", "Every public name, made from the docstrings.", "", "| page | names |",
                      "|---|---|", *rows, ""])  # fmt: skip


def link(group: public_api.Group, name: str) -> str:
    return f"[`{name.rpartition('.')[2]}`]({group.page}.md#{public_api.target(name).path})"


def reference(group: public_api.Group, repository: str) -> str:
    """A page of the reference."""
    parts = [f"# {group.title}", "", group.text, ""]
    for name in group.names:
        found = public_api.target(name)
        where = f"{found.relative_package_filepath.as_posix()}#L{found.lineno}-L{found.endlineno}"
        alias = f"[](){{ #{name} }}\n" if name != found.path else ""
        parts += [alias, f"::: {found.path}", "", f"[Source: `{where.partition('#')[0]}`]({repository}/{where})", ""]
    return "\n".join(parts)


def relinked(name: str, repository: str) -> str:
    """A file of the repository's root as a page. Links to pages of docs/ stay; other links lead to the repository."""

    def target(found: re.Match) -> str:
        path, anchor = posixpath.normpath(found[1]), found[2] or ""
        if path.startswith("docs/") and path.endswith(".md"):
            return f"]({path.removeprefix('docs/')}{anchor})"
        return f"]({repository}/{path}{anchor})"

    return LINK.sub(target, (ROOT / name).read_text(encoding="utf-8"))
