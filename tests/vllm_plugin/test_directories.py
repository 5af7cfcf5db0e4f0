"""Names of adapters in several directories, without vLLM."""

import shutil

from serve.fleet import save_adapters

from s2ft.vllm.resolver import path_of


def test_a_name_is_looked_up_in_all_directories_in_their_order(tmp_path):
    save_adapters(tmp_path / "one", 1)
    save_adapters(tmp_path / "two", 1, first=1)
    shutil.copytree(tmp_path / "one" / "a0", tmp_path / "two" / "a0")
    directories = [tmp_path / "one", tmp_path / "two"]
    found = {name: path_of(name, directories, frozenset(), str(tmp_path)) for name in ("a0", "a1", "a2", "../one/a0")}
    assert found == {"a0": f"{tmp_path}/one/a0", "a1": f"{tmp_path}/two/a1", "a2": None, "../one/a0": None}
    assert path_of("a0", [], frozenset(), str(tmp_path)) is None
