"""Every Python block and every command of README.md and docs/ runs, or has a reason why it can't run here."""

import shutil

import pytest

from .blocks import ROOT, RUN, SHOWN, blocks_of, fences, pages, run
from .shell import Shell, free_port
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


def names(paths):
    return [pytest.param(path, id=str(path.relative_to(ROOT))) for path in paths]


def with_blocks():
    """The pages that have blocks to run."""
    return [page for page in pages() if any(block.reason is None for block in blocks_of(page))]


@pytest.mark.parametrize("page", names(with_blocks()))
def test_the_blocks_of_a_page_run(page, shell):
    if page.name == "images.md":
        pytest.importorskip("torchvision", reason="torchvision is not installed")
    expected = sum(block.reason is None for block in blocks_of(page))
    assert run(page, shell) == expected


@pytest.mark.parametrize("page", names(pages()))
def test_no_block_is_missed(page):
    found = list(fences(page))
    unknown = [(line, language) for line, language in found if language not in (*RUN, *SHOWN)]
    assert unknown == [], f"languages are {', '.join(RUN)} (run) and {', '.join(SHOWN)} (not run)"
    visible = sum(language in RUN for _, language in found)
    assert len(list(blocks_of(page))) >= visible


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= 1500


# ---- the runner itself ------------------------------------------------------------------------------------


def page_with(folder, text):
    page = folder / "page.md"
    page.write_text(text)
    return page


@pytest.mark.parametrize("block", ["python\nassert False", "bash\nfalse", "python\n>>> 1 + 1\n3", "bash\ns2ft merge"])
def test_a_block_that_fails_is_an_error(shell, tmp_path, block):
    with pytest.raises((Exception, SystemExit)):
        run(page_with(tmp_path, f"```{block}\n```\n"), shell)


def test_a_block_is_left_out_with_its_reason(shell, tmp_path, monkeypatch):
    monkeypatch.setattr("docs.blocks.ROOT", tmp_path)
    page = page_with(tmp_path, '<!--- skip: next "no GPU" -->\n\n```bash\nfalse\n```\n\n```bash\ntrue\n```\n')
    assert run(page, shell) == 1
    assert [block.reason for block in blocks_of(page)] == ["no GPU", None]


def test_a_reason_is_required(tmp_path, monkeypatch):
    monkeypatch.setattr("docs.blocks.ROOT", tmp_path)
    with pytest.raises(ValueError, match="write the reason"):
        list(blocks_of(page_with(tmp_path, "<!--- skip: next -->\n\n```bash\nfalse\n```\n")))
