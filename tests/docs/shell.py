"""Runs the commands of a bash block."""

import io
import os
import shlex
import socket
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

from sybil import Example

PORT = "8000"  # the port of `s2ft serve` on the pages
SHELL_CHARACTERS = set("|<>&;$`*(){}")
SECONDS = 120.0  # the time a server has to open its port


class Shell:
    """Evaluates bash blocks: one command a line, run in the working directory.

    Attributes:
        root: The repository, from which `s2ft` is imported.
        port: A free port. It replaces 8000 on the page, so that pages can run at the same time.
        running: The commands in the background.
    """

    def __init__(self, root: Path, port: int):
        self.root, self.port = root, port
        self.running: list[subprocess.Popen] = []

    def __call__(self, example: Example) -> None:
        for line in commands(example.parsed):
            self.run(line)

    def with_port(self, text: str) -> str:
        """Replace the port in the text of a page."""
        return text.replace(f":{PORT}", f":{self.port}").replace(f"--port {PORT}", f"--port {self.port}")

    def run(self, line: str) -> None:
        """Run one command.

        Raises:
            AssertionError: The exit status of the command is not 0.
        """
        if line.endswith("&"):
            self.start(line.removesuffix("&"))
        elif line.startswith("s2ft ") and not SHELL_CHARACTERS & set(line):
            from s2ft.cli.main import main

            status = main(shlex.split(line, comments=True)[1:])
            assert status == 0, f"{line}: exit status {status}"
        elif " | s2ft " in line:
            before, _, after = line.partition(" | s2ft ")
            with mock.patch("sys.stdin", io.StringIO(self.bash(before))):
                self.run(f"s2ft {after}")
        else:
            print(self.bash(line))

    def bash(self, line: str) -> str:
        """Run a command in a process of its own. Returns what it prints.

        Raises:
            AssertionError: The exit status of the command is not 0.
        """
        done = subprocess.run(["bash", "-euo", "pipefail", "-c", line], env=self.environment(), text=True,
                              capture_output=True)  # fmt: skip
        assert done.returncode == 0, f"{line}: exit status {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout

    def start(self, line: str) -> None:
        """Run a server in the background and wait until its port is open.

        Raises:
            AssertionError: The server ended, or its port did not open in time.
        """
        if "--port" not in line:
            line = f"{line.strip()} --port {self.port}"
        self.running.append(subprocess.Popen(["bash", "-c", f"exec {line}"], env=self.environment()))
        end = time.monotonic() + SECONDS
        while self.running[-1].poll() is None and time.monotonic() < end:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            time.sleep(0.1)
        raise AssertionError(f"{line}: the port {self.port} did not open, exit status {self.running[-1].poll()}")

    def environment(self) -> dict[str, str]:
        """The environment of a command: this interpreter's scripts and this repository are found first."""
        return {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(self.root),
            "CUDA_VISIBLE_DEVICES": "",
        }

    def stop(self) -> None:
        """End the commands in the background."""
        for process in self.running:
            process.terminate()
        for process in self.running:
            process.wait(30)


def commands(source: str) -> list[str]:
    """The commands of a block, without comments; a backslash at the end of a line continues it."""
    lines = (line.strip() for line in source.replace("\\\n", " ").splitlines())
    return [line.removeprefix("$ ") for line in lines if line and not line.startswith("#")]
