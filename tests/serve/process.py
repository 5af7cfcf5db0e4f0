"""`s2ft serve` as a process of its own."""

import os
import re
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager

DEADLINE = 120.0


class Process:
    """The process of the server. `lines` holds the lines that it logged."""

    def __init__(self, *arguments):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "s2ft", "serve", "--port", "0", *map(str, arguments)],
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
            env=environment,
        )
        self.lines, self._started = [], threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        assert self._started.wait(DEADLINE), self.lines
        found = [match.group(1) for match in map(re.compile("serving on (http://.*)").search, self.lines) if match]
        assert found, self.lines
        self.url = found[0].strip()

    def _read(self):
        for line in self.process.stderr:
            self.lines.append(line)
            if "serving on" in line:
                self._started.set()
        self._started.set()

    def signal(self, number=signal.SIGTERM):
        self.process.send_signal(number)

    def exit_code(self):
        code = self.process.wait(DEADLINE)
        self._reader.join(DEADLINE)
        return code


@contextmanager
def served(*arguments):
    process = Process(*arguments)
    try:
        yield process
    finally:
        if process.process.poll() is None:
            process.process.kill()
        process.exit_code()
