"""Compiling with the address and undefined-behaviour sanitizers, and running what was compiled."""

import os
import subprocess
from pathlib import Path

import pytest

FLAGS = ("-fsanitize=address,undefined,float-cast-overflow", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer")


def library(name: str) -> str:
    """The path of one of the compiler's own libraries; skips the test where there is none."""
    compiler = os.environ.get("CXX", "g++")
    try:
        found = subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
    except OSError:
        pytest.skip("no C++ compiler")
    if not os.path.isabs(found):
        pytest.skip(f"no {name}")
    return str(Path(found).resolve())


def environment(**variables: str) -> dict[str, str]:
    """For a process that loads sanitized code. libstdc++ comes along, since the address sanitizer looks for
    the function that throws when the process starts, and Python itself does not load it."""
    return {
        **os.environ,
        "LD_PRELOAD": f"{library('libasan.so')} {library('libstdc++.so')}",
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        **variables,
    }
