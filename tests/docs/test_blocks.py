"""Every Python block and every command of README.md and docs/ runs, or has a reason why it can't run here."""

import re
import shutil

import pytest
from support.ranks import free_port

from .blocks import ROOT, RUN, SHOWN, pages, reasons, run
from .shell import Shell
from .workplace import fill


@pytest.fixture(scope="session")
def workplace(tmp_path_factory):
    return fill(tmp_path_factory.mktemp("workplace"))


@pytest.fixture
def shell(workplace, tmp_path, monkeypatch):
    """A shell in a copy of the workplace."""
    shutil.copytree(workplace, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    shell = Shell(ROOT, free_port())
    yield shell
    shell.stop()


# Pages whose blocks take from 4 to 20 seconds. What they show has tests of its own.
LONG = {"any-model.md", "data.md", "evaluate.md", "forgetting.md", "install.md", "many-adapters.md", "options.md"}


def names(paths, long=()):
    return [
        pytest.param(path, id=str(path.relative_to(ROOT)), marks=[pytest.mark.slow] if path.name in long else [])
        for path in paths
    ]


@pytest.mark.parametrize("page", names((page for page in pages() if None in reasons(page)), LONG))
def test_the_blocks_of_a_page_run(page, shell):
    if page.name == "images.md":
        pytest.importorskip("torchvision", reason="torchvision is not installed")
    assert run(page, shell) == sum(reason is None for reason in reasons(page))


@pytest.mark.parametrize("page", names(pages()))
def test_no_block_is_missed(page):
    opened = re.findall(r"^ *```+ *(\w+)", page.read_text(encoding="utf-8"), re.MULTILINE)
    assert [language for language in opened if language not in (*RUN, *SHOWN)] == [], f"run: {RUN}, not run: {SHOWN}"
    assert len(list(reasons(page))) >= sum(language in RUN for language in opened)


# ---- the runner itself ------------------------------------------------------------------------------------


def page_with(folder, text):
    page = folder / "page.md"
    page.write_text(text)
    return page


@pytest.mark.parametrize("block", ["python\nassert False", "bash\nfalse", "python\n>>> 1 + 1\n3", "bash\ns2ft merge"])
def test_a_block_that_fails_is_an_error(shell, tmp_path, block):
    with pytest.raises((Exception, SystemExit)):
        run(page_with(tmp_path, f"```{block}\n```\n"), shell)


def test_a_block_is_left_out_with_its_reason_alone(shell, tmp_path, monkeypatch):
    monkeypatch.setattr("docs.blocks.ROOT", tmp_path)
    page = page_with(tmp_path, '<!--- skip: next "no GPU" -->\n\n```bash\nfalse\n```\n\n```bash\ntrue\n```\n')
    assert run(page, shell) == 1 and list(reasons(page)) == ['"no GPU"', None]
    with pytest.raises(ValueError, match="write the reason"):
        list(reasons(page_with(tmp_path, "<!--- skip: next -->\n\n```bash\nfalse\n```\n")))
