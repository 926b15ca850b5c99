"""Runs one generated program, which comes on stdin, under limits. `execution.py` starts it as a process.

It must import nothing of this project: it runs with `python -I`, by its path.
"""

import os
import resource
import sys

PASSED = 42  # the exit status when the program's end was reached: one that exits early has not passed

_LIMITS = {
    resource.RLIMIT_CPU: 10,  # seconds
    resource.RLIMIT_AS: 2 << 30,
    resource.RLIMIT_FSIZE: 16 << 20,
    resource.RLIMIT_NOFILE: 32,
    resource.RLIMIT_NPROC: 1,  # neither processes nor threads; root is exempt
    resource.RLIMIT_CORE: 0,
}


def main() -> None:
    """Limits itself, executes stdin, and exits with PASSED."""
    program = sys.stdin.read()
    for kind, wanted in _LIMITS.items():
        hard = resource.getrlimit(kind)[1]
        value = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(kind, (value, value))
    exec(compile(program, "answer", "exec"), {"__name__": "__main__"})
    os._exit(PASSED)  # threads and exit handlers of the program are not waited for


if __name__ == "__main__":
    main()
