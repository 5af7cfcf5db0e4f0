"""Runs a command with a time limit, so that nothing of it is left behind."""

import os
import signal
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

LEAST = 2.0  # with less time than this, in seconds, a command is not started
NO_TIME = "no time was left"


@dataclass
class Done:
    """What a command did.

    Attributes:
        status: Exit status; None if the command was not started or was ended.
        text: Its output, both streams.
        why: Why it did not end well, or an empty string.
    """

    status: int | None
    text: str
    why: str = ""

    @property
    def good(self) -> bool:
        return self.status == 0

    @property
    def was_ended(self) -> bool:
        """Whether it was started, and ended at its limit of time."""
        return self.status is None and self.why != NO_TIME


def run_limited(
    command: list[str],
    limit: float,
    log: Path,
    *,
    environment: Mapping[str, str] | None = None,
    folder: Path | None = None,
) -> Done:
    """Run a command in a process group of its own. At the limit, the whole group is ended.

    Args:
        command: The program and its arguments.
        limit: Seconds that it may take. With less than LEAST it is not started.
        log: File for its output.
        environment: All its variables; default: those of this process.
        folder: Its working directory; default: that of this process.
    """
    if limit < LEAST:
        return Done(None, "", NO_TIME)
    log.parent.mkdir(parents=True, exist_ok=True)
    begin, why = time.monotonic(), ""
    with log.open("w+", encoding="utf-8", errors="replace") as file:
        process = subprocess.Popen(
            command, cwd=folder, stdout=file, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        try:
            status = process.wait(limit)
        except BaseException as error:  # an interrupt of this process must not leave the group behind either
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            status, why = None, f"ended after {time.monotonic() - begin:.0f} seconds"
        file.seek(0)
        text = file.read()
    return Done(status, text, why or (f"exit status {status}" if status else ""))
