"""The pages that are generated from the code are complete."""

import os
import re

import command_pages
import model_pages
import pytest
import type_pages
from support.aliases import missing
from support.composites import part_types
from support.inside import FAMILIES, composite

from .blocks import ROOT


def test_every_command_has_its_options():
    commands = command_pages.page()
    for name in command_pages.main.COMMANDS:
        section = commands.partition(f"\n## s2ft {name}\n")[2].partition("\n## ")[0]
        shown = [action for action in command_pages.parser_of(name)._actions if command_pages.shown(action)]
        assert section.count("| `") >= len(shown) > 0
    assert command_pages.main.TRACEBACK not in os.environ  # commands of later tests would raise


def check_types(listed):
    known = {model_type for model_type in FAMILIES if not missing(model_type)}
    assert listed <= known and known - listed <= {*composite.PROJECTORS, *part_types()}


def check_llama(row):
    assert "q k v o u g d" in row and "move, stay (grouped queries)" in row and row.count("yes") == 1


def test_every_family_is_in_the_table():
    found = model_pages.makers()
    check_types(set(found))
    check_llama(model_pages.row("llama", model_pages.couplings(found["llama"]), "all"))


@pytest.mark.slow
def test_the_table_has_a_row_for_every_family():
    rows = [line for line in model_pages.page().splitlines() if line.startswith("| `")]
    check_types({re.match(r"\| `([\w-]+)`", row)[1] for row in rows})
    (llama,) = [row for row in rows if row.startswith("| `llama`")]
    check_llama(llama)


def test_every_type_of_the_benchmark_is_in_the_table_with_its_result():
    rows = [line for line in type_pages.page().splitlines() if line.startswith("| `")]
    assert len(rows) == len(type_pages.TABLE.read_text().splitlines()) - 2
    (llama,) = [row for row in rows if row.startswith("| `llama`")]
    assert "registered" in llama and "pass" in llama


def test_a_failing_check_is_named(tmp_path):
    head, names, *_ = type_pages.TABLE.read_text().splitlines()
    cells = dict.fromkeys(names.split(","), "yes") | {"type": "odd", "one_sided": "2", "gradients": "3 of 4"}
    (tmp_path / "rows.csv").write_text("\n".join([head, names, ",".join(cells.values())]))
    row = type_pages.page(tmp_path / "rows.csv").splitlines()[-1]
    assert "gradients: 3 of 4" in row and "pass" not in row


@pytest.mark.parametrize("name", ["README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "examples/README.md"])
def test_links_between_files_of_the_repository(name):
    """mkdocs checks the links of docs/; these files are outside."""
    page = ROOT / name
    links = re.findall(r"\]\((?!https?://|#|mailto:)([^)\s#]+)", page.read_text(encoding="utf-8"))
    assert [link for link in links if not (page.parent / link).exists()] == []
