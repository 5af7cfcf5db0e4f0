"""Compile with the address and undefined-behaviour sanitizers, and run the compiled code."""

import os
import subprocess
from pathlib import Path

import pytest

FLAGS = ("-fsanitize=address,undefined,float-cast-overflow", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer")


def library(name: str) -> str:
    """The path of one of the compiler's own libraries. Skips the test if there is none."""
    compiler = os.environ.get("CXX", "g++")
    try:
        found = subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
    except OSError:
        pytest.skip("no C++ compiler")
    if not os.path.isabs(found):
        pytest.skip(f"no {name}")
    return str(Path(found).resolve())


def environment(**variables: str) -> dict[str, str]:
    """The environment of a process that loads sanitized code.

    It preloads libstdc++ too. The address sanitizer looks there for the function that throws exceptions when the
    process starts, and Python itself does not load that library.
    """
    return {
        **os.environ,
        "LD_PRELOAD": f"{library('libasan.so')} {library('libstdc++.so')}",
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        **variables,
    }
