"""Every way to install s2ft. Each test installs into a folder of its own and runs s2ft from another folder."""

import json
import tarfile
import zipfile

import pytest

SHOW = "import json, s2ft; print(json.dumps([s2ft.__file__, s2ft.build_info()]))"


def test_the_sdist_has_sources_and_tests_and_no_built_files(run, source, tmp_path):
    (source / "s2ft" / "_build.json").write_text("{}")
    (source / "s2ft" / "_C.cpython-311-x86_64-linux-gnu.so").write_text("")
    run(["setup.py", "-q", "sdist", "-d", tmp_path], cwd=source, S2FT_BUILD="none")
    (archive,) = tmp_path.glob("s2ft-*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    for path in (
        *source.glob("csrc/**/*.*"),
        *source.glob("tests/packaging/*.py"),
        *source.glob("tests/cuda_on_cpu/*"),
    ):
        if path.is_file():
            assert path.relative_to(source).as_posix() in names
    assert {"setup.py", "pyproject.toml", "MANIFEST.in", "s2ft/ops/sliced.py"} <= names
    assert "s2ft/train/problems.jsonl.gz" in names
    assert not [name for name in names if name.endswith((".so", ".pyc")) or name == "s2ft/_build.json"]


def test_the_wheel_without_kernels_is_for_every_platform(run, source, tmp_path):
    run(["setup.py", "-q", "bdist_wheel", "-d", tmp_path], cwd=source, S2FT_BUILD="none")
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert "s2ft/train/problems.jsonl.gz" in names and not [
        name for name in names if name.startswith(("bench", "tests"))
    ]


PIP = ("-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation")
WAYS = {"pip": (*PIP, "sdist.tar.gz"), "editable": (*PIP, "-e", "."), "setup.py": ("setup.py", "-q", "install")}


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_every_way_installs_the_kernels_and_the_command(way, run, source, environment, tmp_path):
    """s2ft, run from another folder, is the installed one. pip installs the source distribution."""
    if way == "pip":
        run(["setup.py", "-q", "sdist", "-d", tmp_path], cwd=source, S2FT_BUILD="none")
        next(tmp_path.glob("s2ft-*.tar.gz")).rename(source / "sdist.tar.gz")
    run(WAYS[way], python=environment, cwd=source, S2FT_BUILD="cpu")
    file, info = json.loads(run(["-c", SHOW], python=environment).stdout.splitlines()[-1])
    assert info["compiled"] is True and info["reason"] and (environment.parent / "s2ft").exists()
    assert file.startswith(str(source if way == "editable" else environment.parents[1]))
