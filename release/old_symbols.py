"""Makes a build on a new Linux run on an old one: the linker sees only the symbols that the old one has.

A wheel with the tag manylinux_2_28 may use versions of symbols up to glibc 2.28 and the C++ library of GCC 8. The
linker takes the newest version of every symbol that it finds, so a build on a newer system would need that system.
This module writes libraries for the linker that offer, for each symbol, the newest version that is old enough. What the
old C++ library does not have at all comes from the static one, as in Red Hat's toolsets. LDFLAGS=-L<folder> makes the
linker take these libraries. They contain no code and are not loaded at run time.
"""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

# What manylinux_2_28 has, by the prefix of a version (PEP 600).
NEWEST = {"GLIBC": (2, 28), "GLIBCXX": (3, 4, 25), "CXXABI": (1, 3, 11)}
# Names that C headers of newer systems use. glibc 2.28 does not have them, so they are defined inside the module.
# 0 means "there may be several threads", so that counters are atomic.
DEFINED = "char __libc_single_threaded = 0;"


def offered(version: str) -> tuple[int, ...] | None:
    """The version's numbers if the old system has it, else None.

    Example:
        >>> offered("GLIBC_2.14"), offered("GLIBC_2.34"), offered("GLIBC_PRIVATE")
        ((2, 14), None, None)
    """
    match = re.fullmatch(r"([A-Z]+)_(\d+(?:\.\d+)+)", version)
    if match is None or match[1] not in NEWEST:
        return None
    numbers = tuple(int(part) for part in match[2].split("."))
    return numbers if numbers <= NEWEST[match[1]] else None


def exported(library: Path) -> Iterator[tuple[str, str, str, int]]:
    """Yield name, version, type and size of every symbol that a shared library exports."""
    command = ["readelf", "--dyn-syms", "--wide", library]
    for line in subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines():
        words = line.split()
        if len(words) < 8 or words[6] in ("UND", "ABS", "Ndx") or "@" not in words[7]:  # ABS: a version itself
            continue
        name, version = re.split("@+", words[7])
        yield name, version, words[3], int(words[2], 0)


def newest_offered(library: Path) -> dict[str, tuple[str, str, int]]:
    """Version, type and size of each symbol, in the newest version that the old system has."""
    found: dict[str, tuple[str, str, int]] = {}
    for name, version, kind, size in exported(library):
        numbers = offered(version)
        if numbers and (name not in found or numbers > offered(found[name][0])):
            found[name] = (version, kind, size)
    return found


def write_stub(library: Path, folder: Path, compiler: str) -> Path:
    """Write a library without code, with the name and the old symbols of `library`. Returns its path."""
    symbols = newest_offered(library)
    types = {"OBJECT": "object", "TLS": "tls_object"}
    lines, nodes = [], {}
    for name, (version, kind, size) in symbols.items():
        section = {"OBJECT": ".data", "TLS": '.section .tdata,"awT",@progbits'}.get(kind, ".text")
        lines += [section, f".globl {name}", f".type {name},@{types.get(kind, 'function')}", f".size {name},{size}"]
        lines.append(f"{name}: .skip {max(1, size if kind in types else 1)}")
        nodes.setdefault(version, []).append(name)
    stub = folder / library.name
    assembly, script = stub.with_suffix(".s"), stub.with_suffix(".map")
    assembly.write_text("\n".join(lines) + "\n")
    texts = [f"{version} {{ global: {'; '.join(names)};" for version, names in nodes.items()]
    script.write_text("\n".join(f"{text}{' local: *;' if not i else ''} }};" for i, text in enumerate(texts)) + "\n")
    subprocess.run(
        [compiler, "-shared", "-nostdlib", f"-Wl,-soname,{library.name},--version-script,{script}"]
        + [str(assembly), "-o", str(stub)],
        check=True,
    )
    return stub


def write_libraries(folder: Path, compiler: str | None = None) -> Path:
    """Write the libraries that LDFLAGS=-L<folder> names.

    Args:
        folder: A new folder.
        compiler: The C++ compiler that will link; default: CXX or c++.

    Returns:
        The folder.
    """
    compiler = compiler or os.environ.get("CXX") or "c++"
    folder.mkdir(parents=True, exist_ok=True)

    def found(name: str) -> Path:
        answer = subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True)
        if not os.path.isabs(answer.stdout.strip()):
            raise FileNotFoundError(f"{compiler} has no {name}")
        return Path(answer.stdout.strip())

    stubs = {name: write_stub(found(name), folder, compiler) for name in ("libc.so.6", "libm.so.6", "libstdc++.so.6")}
    source = folder / "defined.c"
    source.write_text(DEFINED + "\n")
    defined = source.with_suffix(".o")
    subprocess.run(
        [compiler, "-x", "c", "-fPIC", "-fvisibility=hidden", "-c", str(source), "-o", str(defined)], check=True
    )
    loader = "AS_NEEDED ( ld-linux-x86-64.so.2 )"
    scripts = {
        "libc.so": f"GROUP ( {stubs['libc.so.6']} {defined} {found('libc_nonshared.a')} {loader} )",
        "libm.so": f"INPUT ( {stubs['libm.so.6']} )",
        "libstdc++.so": f"INPUT ( {stubs['libstdc++.so.6']} {found('libstdc++.a')} )",
    }
    for name in ("libdl", "libpthread", "librt"):  # new systems have their symbols in libc
        scripts[f"{name}.so"] = f"INPUT ( {stubs['libc.so.6']} )"
    for name, text in scripts.items():
        (folder / name).write_text(f"/* A script for the linker; see release/old_symbols.py. */\n{text}\n")
    return folder


if __name__ == "__main__":
    write_libraries(Path(sys.argv[1]))
