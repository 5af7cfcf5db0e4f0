"""Every way to install s2ft. Each test installs into a folder of its own and runs s2ft from another folder."""

import json
import tarfile
import zipfile

import pytest

SHOW = "import json, s2ft; print(json.dumps([s2ft.__file__, s2ft.build_info()]))"


def show(run, path):
    return json.loads(run(["-c", SHOW], PYTHONPATH=path).stdout.splitlines()[-1])


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
    assert {"setup.py", "pyproject.toml", "MANIFEST.in", "s2ft/ops/sliced_linear.py"} <= names
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


def check_installed(run, environment, source, from_source):
    """s2ft, run from another folder, is the installed one and has its kernels. The command s2ft exists."""
    file, info = json.loads(run(["-c", SHOW], python=environment).stdout.splitlines()[-1])
    assert info["compiled"] is True and info["reason"]
    assert file.startswith(str(source)) is from_source
    assert file.startswith(str(environment.parents[1])) is not from_source
    assert (environment.parent / "s2ft").exists()


@pytest.mark.slow
@pytest.mark.parametrize("editable", (False, True))
def test_pip(run, source, environment, editable):
    run(
        ["-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", *(["-e"] if editable else []), source],
        python=environment,
        S2FT_BUILD="cpu",
    )
    check_installed(run, environment, source, from_source=editable)


@pytest.mark.slow
def test_setup_py_install(run, source, environment):
    run(["setup.py", "-q", "install"], python=environment, cwd=source, S2FT_BUILD="cpu")
    check_installed(run, environment, source, from_source=False)


@pytest.mark.slow
def test_the_sdist_builds(run, source, tmp_path):
    run(["setup.py", "-q", "sdist", "-d", tmp_path], cwd=source, S2FT_BUILD="none")
    (archive,) = tmp_path.glob("s2ft-*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path, filter="data")
    (unpacked,) = (p for p in tmp_path.glob("s2ft-*") if p.is_dir())
    run(["setup.py", "-q", "build", "--build-lib", "built"], cwd=unpacked, S2FT_BUILD="cpu")
    assert show(run, unpacked / "built")[1]["compiled"] is True
