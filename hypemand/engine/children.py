"""Children of the daemon that it watches by a descriptor: a process id may be another's by the time it is used."""

import os
import signal


def watched(pid: int) -> int:
    """A pidfd of *pid*, a child that was started just now. Where none is to be had, the child is killed.

    Raises:
        OSError: No descriptor is left.
    """
    try:
        return os.pidfd_open(pid)
    except OSError:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        raise
