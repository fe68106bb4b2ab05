"""What becomes a hook's command: a program of its own, started by its path, that cleans up after the daemon first.

It does here what may hang: a command on a filesystem that does not answer
holds up this process, and not the daemon.
"""

import contextlib
import os
import signal
import sys
from typing import NoReturn

NOT_FOUND, NOT_RUN = 127, 126
"""Exit statuses, as shells have them."""


def main(command: list[str]) -> NoReturn:
    """Become *command*; where that can't be, stderr says why."""
    _open_both_ways(1, 2)
    for name in os.listdir("/proc/self/fd"):  # noqa: PTH208 - without pathlib it starts twice as fast
        if int(name) > 2:
            with contextlib.suppress(OSError):
                os.close(int(name))
    os.chdir("/")
    for number in signal.valid_signals():
        with contextlib.suppress(OSError, ValueError):  # those that nobody can change
            signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    try:
        os.execv(command[0], command)  # noqa: S606 - no shell is between, that is the point
    except OSError as error:
        hint = " (or its interpreter)" if isinstance(error, FileNotFoundError) else ""
        os.write(2, f"{command[0]} can't be started: {error.strerror}{hint}\n".encode(errors="backslashreplace"))
        os._exit(NOT_FOUND if isinstance(error, FileNotFoundError) else NOT_RUN)


def _open_both_ways(first: int, *others: int) -> None:
    """Have whoever writes to a pipe hold its other end too: a daemon that dies must not end a pager by SIGPIPE."""
    with contextlib.suppress(OSError):
        both = os.open(f"/proc/self/fd/{first}", os.O_RDWR)
        for number in (first, *others):
            os.dup2(both, number)


if __name__ == "__main__":
    main(sys.argv[1:])
