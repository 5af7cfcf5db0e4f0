"""A process that has imported PyTorch and runs each script it gets in a fork, because the import takes two seconds.

It reads one JSON object a line: script, folder, environment, and the files for stdout and stderr. It answers with the
exit status. torch.utils.cpp_extension is not imported, because it reads the environment when it is.
"""

import json
import os
import sys
import traceback

import setuptools  # noqa: F401
import torch  # noqa: F401


def run(job: dict) -> None:
    """Run the script of a job and end the process."""
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(job[name], os.O_WRONLY | os.O_CREAT), number)
    os.environ.clear()
    os.environ.update(job["environment"])
    os.chdir(job["folder"])
    sys.argv, status = ["-c"], 0
    sys.path.insert(0, "")
    try:
        exec(job["script"], {"__name__": "__main__"})
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    for line in sys.stdin:
        child = os.fork()
        if not child:
            run(json.loads(line))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
