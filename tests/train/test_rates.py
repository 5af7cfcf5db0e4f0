"""The suggested learning rate, against the rates that are known to have been good."""

import pytest
from tiny import save_tiny, tiny_model

from s2ft.train import rates


@pytest.mark.parametrize("width, good", rates.KNOWN)
def test_each_known_rate_is_in_the_range(width, good):
    found = rates.suggested_rate(width)
    assert found.lowest <= good <= found.highest
    assert f"| {good:.0e}".replace("e-0", "e-") in rates.__doc__


def test_a_width_that_is_none_is_refused():
    with pytest.raises(ValueError, match="width must be above 0"):
        rates.suggested_rate(0)


def test_a_model_without_a_width_has_none():
    assert rates.width_of(object()) is None and rates.width_of(tiny_model()) == 32


def test_plan_prints_it(tmp_path, capsys):
    import json

    from s2ft.cli.main import main

    save_tiny(tmp_path)
    main(["plan", str(tmp_path), "--d-ratio", "0.1"])
    assert "learning rate: no rule is known for all tasks; start with 0.04" in capsys.readouterr().out
    main(["plan", str(tmp_path), "--d-ratio", "0.1", "--json"])
    assert json.loads(capsys.readouterr().out)["learning_rate"] == {"rate": 0.04, "lowest": 0.01, "highest": 0.1}
