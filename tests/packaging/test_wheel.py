"""The scripts that build and check the wheel. The wheel itself needs the package index: make wheel, make wheel-check."""

import platform
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from support.inside import _build
from support.sources import ROOT

sys.path.insert(0, str(ROOT / "release"))

import check_wheel
import old_symbols

needs_gcc = pytest.mark.skipif(
    platform.machine() != "x86_64" or not all(map(shutil.which, ("readelf", "cc", "c++"))), reason="no readelf or GCC"
)


@pytest.mark.parametrize(
    "tags, problem",
    (
        ("cp310-abi3-manylinux_2_28_x86_64", ""),
        ("cp310-abi3-manylinux_2_27_x86_64.manylinux_2_28_x86_64", ""),
        ("cp310-abi3-manylinux_2_34_x86_64", "its platform is manylinux_2_34_x86_64"),
        ("cp310-abi3-linux_x86_64", "its platform is linux_x86_64"),
        ("cp311-cp311-manylinux_2_28_x86_64", "its tag is cp311-cp311"),
        ("cp311-abi3-manylinux_2_28_x86_64", "its tag is cp311-abi3"),
    ),
)
def test_tags(tags, problem):
    found = check_wheel.wrong_tags(f"s2ft-0.1.0-{tags}.whl")
    assert found.startswith(problem) and bool(found) is bool(problem)


@needs_gcc
@pytest.mark.skipif(
    not getattr(_build.load(), "__file__", "").endswith("/_C.abi3.so"), reason="no kernels that are for every Python"
)
def test_the_module_needs_only_symbols_that_somebody_has(tmp_path):
    """A function that no library has is found, although the linker accepts it."""
    assert check_wheel.strange_symbols(Path(_build.load().__file__)) == []
    program = 'int nobody_has_this(void); int puts(const char*); int f(void) { return nobody_has_this() + puts(""); }'
    (tmp_path / "a.c").write_text(program)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", tmp_path / "a.so", tmp_path / "a.c"], check=True)
    assert check_wheel.strange_symbols(tmp_path / "a.so") == ["nobody_has_this"]


@pytest.mark.parametrize(
    "version, numbers",
    (("GLIBC_2.2.5", (2, 2, 5)), ("GLIBC_2.28", (2, 28)), ("GLIBC_2.29", None), ("GLIBCXX_3.4.25", (3, 4, 25)))
    + (("GLIBCXX_3.4.26", None), ("CXXABI_1.3.13", None), ("GLIBC_PRIVATE", None), ("CXXABI_TM_1", None)),
)
def test_versions_of_the_old_system(version, numbers):
    assert old_symbols.offered(version) == numbers


def newest_versions(library):
    """The newest version that a library needs, by prefix."""
    listed = subprocess.run(["readelf", "--version-info", "--wide", library], capture_output=True, text=True).stdout
    needed = listed.partition(".gnu.version_r")[2]
    found = {}
    for prefix, numbers in re.findall(r"Name: (GLIBC|GLIBCXX|CXXABI)_([\d.]+)", needed):
        found[prefix] = max(found.get(prefix, ()), tuple(map(int, numbers.split("."))))
    return found


PROGRAM = """
#include <cmath>
#include <memory>
#include <sstream>
#include <stdexcept>
#include <vector>
extern "C" const char* f(double x, int n) {
  static std::string text;
  auto shared = std::make_shared<std::vector<double>>(n, x);
  std::ostringstream out;
  out << std::exp(shared->at(n - 1));
  try {
    shared->at(n);
  } catch (const std::out_of_range& error) {
    out << " caught";
  }
  text = out.str();
  return text.c_str();
}
"""


@needs_gcc
def test_a_library_runs_that_is_linked_with_old_symbols(run, tmp_path):
    """Its streams and exceptions work, and it needs nothing that is newer than glibc 2.28 and GCC 8."""
    libraries = old_symbols.write_libraries(tmp_path / "libraries")
    (tmp_path / "f.cpp").write_text(PROGRAM)
    flags = ["-std=c++20", "-O2", "-shared", "-fPIC", f"-L{libraries}", "-Wl,--exclude-libs,ALL"]
    subprocess.run(["c++", *flags, "-o", tmp_path / "f.so", tmp_path / "f.cpp"], check=True)
    found = newest_versions(tmp_path / "f.so")
    assert found and all(numbers <= old_symbols.NEWEST[prefix] for prefix, numbers in found.items())
    call = f"import ctypes; f = ctypes.CDLL({str(tmp_path / 'f.so')!r}).f; f.restype = ctypes.c_char_p"
    assert run(["-c", f"{call}; print(f(ctypes.c_double(0), 2).decode())"]).stdout == "1 caught\n"


@pytest.mark.slow
@needs_gcc
def test_a_wheel_with_cpu_kernels_is_for_every_python_and_old_systems(run, source, environment, tmp_path):
    flags = f"-L{old_symbols.write_libraries(tmp_path / 'libraries')} -Wl,--exclude-libs,ALL"
    run(["setup.py", "-q", "bdist_wheel", "-d", tmp_path], cwd=source, S2FT_BUILD="cpu", LDFLAGS=flags)
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-cp310-abi3-linux_x86_64.whl")
    with zipfile.ZipFile(wheel) as archive:
        module = Path(archive.extract("s2ft/_C.abi3.so", tmp_path))
    assert check_wheel.strange_symbols(module) == []
    assert all(numbers <= old_symbols.NEWEST[prefix] for prefix, numbers in newest_versions(module).items())
    run(["-m", "pip", "install", "-q", "--no-deps", wheel], python=environment)
    assert run(["-c", "import s2ft; print(s2ft.build_info()['compiled'])"], python=environment).stdout == "True\n"
