"""release/suites.py and the page that is made from its results."""

import datetime
import json

import pytest
import suite_page
import suites

TESTS = """
import pytest
def test_right(): pass
def test_wrong(): assert False
@pytest.mark.skip(reason="needs a | card")
def test_elsewhere(): pass
"""


@pytest.fixture
def outputs(tmp_path, monkeypatch):
    monkeypatch.setattr(suites, "OUTPUTS", tmp_path / "outputs")
    monkeypatch.setattr(suites, "MATRIX", tmp_path / "matrix.json")
    monkeypatch.setattr(suites, "commit", lambda: "0123abcd")
    return tmp_path


def test_a_run_is_counted_and_shown(outputs, monkeypatch, capsys):
    (outputs / "test_some.py").write_text(TESTS)
    command = f"PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 {suites.sys.executable} -m pytest -p no:cacheprovider -c /dev/null {outputs}/test_some.py"
    some = {
        "tests": suites.Suite("some tests", command, 5),
        "fine": suites.Suite("a command", "echo well", 5),
        "end-less": suites.Suite("a command", "sleep 60", 1 / 600),
    }
    for module in (suites, suite_page):
        monkeypatch.setattr(module, "SUITES", some)
    monkeypatch.setattr("sys.argv", ["suites.py"])
    assert suites.main() == 1
    found = json.loads(suites.MATRIX.read_text())
    assert [found["tests"][key] for key in ("passed", "failed", "skipped")] == [1, 1, {"needs a | card": 1}]
    assert found["fine"]["passed"] == 1 and found["fine"]["last line"] == "well"
    assert found["end-less"]["failed"] == 1 and "stopped after" in found["end-less"]["last line"]
    assert "tests: 1 passed, 1 failed, 1 skipped" in capsys.readouterr().out

    page = suite_page.page(suites.MATRIX)
    assert "| `tests` | some tests | 1, 1: **red** | 1 |" in page and "test_wrong" in page and "needs a | card" in page
    assert "stale*" not in page.partition("\n## ")[0].partition("|---")[2]
    assert "*stale*" in suite_page.page(suites.MATRIX, datetime.date.today() + datetime.timedelta(days=31))
