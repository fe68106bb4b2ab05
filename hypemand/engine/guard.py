"""The guard: a small process that has guests thawed when the daemon that froze them can't.

A program of its own, started by its path: it imports a few modules of the
standard library and nothing else, to live in a few megabytes. `guarding`
starts it and is the other end of its two pipes, which carry lines:

- from the daemon: ``freeze RUN DEADLINE`` (of the monotonic clock, in
  seconds), ``thawed RUN``, ``pong NUMBER``, ``goodbye``;
- to the daemon: ``hello``, ``ack RUN``, ``ping NUMBER``.

A daemon that answers keeps the duty to thaw, whatever its deadlines. One that
does not is killed, for two at once would tear a copy or thaw the next run's
freeze. Then a fresh process takes the state lock and settles all open runs.
"""

import math
import os
import select
import signal
import sys
import time

TYPE_CHECKING = False
if TYPE_CHECKING:  # `typing` and `collections` would take a megabyte
    from collections.abc import Callable

PING_S = 1.0
"""How often the daemon is pinged; and once more shortly before each deadline, and right at it."""
ANSWER_S = 0.5
"""How old a ping may be at a deadline before the daemon counts as hung."""
HUNG_S = 10.0
"""The same far from any deadline, and once the daemon has answered after it."""
LATE_S = 0.3
"""A guard that is woken so much too late is on a busy machine, where the daemon is late, too."""
ASLEEP_S = 1.0
"""So much, and it was stopped, and the daemon perhaps with it, which gets `WAKING_S` on top."""
WAKING_S = 2.0
LEAVING_S = 3.0
"""What a daemon gets to end by itself that has closed its pipe: it may still be writing its log."""
DYING_S = 5.0
"""How long its first thread is waited for after a SIGKILL."""
CHILDREN_S = 2.0
"""How long its children are."""
LOOK_S = 0.01
SETTLE_S = 90.0
"""How long one try to settle may take before it is killed."""
PAUSE_S = 1.0
"""Between two tries, while a guest may stand still."""
LONGEST_PAUSE_S = 30.0
"""The same where none does."""
OWNER = "HYPEMAND_OWNER"
"""In the environment of processes that must not outlive the one that started them."""
ENDED = "the daemon has ended"
IGNORED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGABRT, signal.SIGQUIT, signal.SIGPIPE)


class Watch:
    """The daemon's leases, and whether it answers."""

    def __init__(self, inbox: int, outbox: int) -> None:
        self._inbox = inbox
        self._outbox = outbox
        self._rest = b""
        self._poll = select.poll()
        self._poll.register(inbox, select.POLLIN)
        self.leases: dict[str, float] = {}
        self._strict: dict[str, float] = {}
        """Leases whose deadline the daemon has not answered after, yet."""
        self._said_goodbye = False
        self._number = 0
        self._sent_at = self._heard_at = self._looked_at = time.monotonic()
        self._silent_since: float | None = None
        """Set while a ping is not answered; may lie ahead, where the daemon is given time to wake."""

    def wait(self) -> str | None:
        """Watch until somebody else has to act.

        Returns:
            Why; None after a goodbye.
        """
        self._tell("hello")
        while not self._said_goodbye:
            wait_s = self._wait_s(self._now(0.0))
            readable = self._poll.poll(None if math.isinf(wait_s) else math.ceil(wait_s * 1000))
            now = self._now(wait_s)
            if readable:
                data = os.read(self._inbox, 65536)
                if not data:
                    return ENDED
                self._take(data)
            elif self._silent_since is not None and now >= self._hung_at(self._silent_since):
                return f"the daemon did not answer for {now - self._sent_at:.1f} s"
            elif self._silent_since is None and self.leases and now >= self._ping_at():
                self._ping(now)
        return None

    def _now(self, expected_s: float) -> float:
        """The time. Where it is later than *expected_s* after the last look, the daemon is not to blame for that."""
        now = time.monotonic()
        late_s = now - self._looked_at - expected_s
        if self._silent_since is not None and late_s > LATE_S:
            self._silent_since = max(self._silent_since, now + (WAKING_S if late_s > ASLEEP_S else 0.0))
        self._looked_at = now
        return now

    def _deadline(self) -> float:
        return min(self._strict.values(), default=math.inf)

    def _hung_at(self, silent_since: float) -> float:
        return min(silent_since + HUNG_S, max(silent_since + ANSWER_S, self._deadline()))

    def _ping_at(self) -> float:
        deadline = self._deadline()
        before = deadline - ANSWER_S
        return min(self._sent_at + PING_S, before if self._sent_at < before else deadline)

    def _wait_s(self, now: float) -> float:
        """Seconds until there is something to do."""
        if not self.leases:
            return math.inf
        at = self._ping_at() if self._silent_since is None else self._hung_at(self._silent_since)
        return max(0.0, at - now)

    def _ping(self, now: float) -> None:
        self._number += 1
        self._sent_at = self._silent_since = now
        self._tell(f"ping {self._number}")

    def _take(self, data: bytes) -> None:
        if self._silent_since is not None:
            self._silent_since = max(self._silent_since, time.monotonic())
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            word, *rest = line.decode().split()
            self._obey(word, rest)

    def _obey(self, word: str, rest: list[str]) -> None:
        if word == "freeze":
            run, deadline = rest
            if not self.leases:
                self._sent_at, self._silent_since = time.monotonic(), None
            self.leases[run] = self._strict[run] = float(deadline)
            self._tell(f"ack {run}")
        elif word == "thawed":
            self.leases.pop(rest[0], None)
            self._strict.pop(rest[0], None)
        elif word == "pong" and rest == [str(self._number)]:
            self._silent_since = None
            self._strict = {run: at for run, at in self._strict.items() if at > self._sent_at}
        elif word == "goodbye":
            self._said_goodbye = True

    def _tell(self, line: str) -> None:
        try:
            os.write(self._outbox, f"{line}\n".encode())
        except BrokenPipeError:
            pass  # its own pipe ends with it, and that is what counts


class Process:
    """A process that is to end, and its children: those with *token* in their environment."""

    def __init__(self, pid: int, token: str) -> None:
        self.pid = pid
        self._token = f"{OWNER}={token}".encode()
        try:
            self.pidfd = os.pidfd_open(pid)
        except ProcessLookupError:
            self.pidfd = -1

    def end(self, grace_s: float) -> None:
        """Kill it and its children, and return once they can do nothing more.

        Args:
            grace_s: What it gets to end by itself.
        """
        if self.pidfd >= 0 and not _wait_until(self._is_over, grace_s):
            try:
                signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
            except ProcessLookupError:
                pass
            _wait_until(self._is_over, DYING_S)
        _wait_until(self._kill_children, CHILDREN_S)

    def _is_over(self) -> bool:
        """Whether its first thread is: others that hang in a filesystem may outlive it, and do nothing any more."""
        return is_readable(self.pidfd, 0.0) or _state_of(self.pid) in ("Z", "X")

    def _kill_children(self) -> bool:
        """Kill those that are left; whether there were none."""
        left = [pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if self._owns(pid)]
        for pid in left:
            try:
                os.kill(pid, signal.SIGKILL)
            except OSError:
                pass  # gone
        return not left

    def _owns(self, pid: int) -> bool:
        try:
            with open(f"/proc/{pid}/environ", "rb") as file:
                return self._token in file.read().split(b"\0")
        except OSError:
            return False  # gone, or somebody else's


def settle(command: list[str], longest_pause_s: float) -> None:
    """Have *command* settle all open runs, again and again until it says that none is left to us (exit status 0)."""
    pause_s = PAUSE_S
    while True:
        try:
            if _run(command) == 0:
                return
        except Exception as error:  # noqa: BLE001 - whatever it is, guests may be frozen
            _complain(f"hypemand guard: open runs can't be settled yet: {error}")
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)  # what could be thawed at once is; the rest may be left to others
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, longest_pause_s)


def _run(command: list[str]) -> int:
    """The exit status of *command*; killed, with its children, when it takes too long."""
    token = f"guard-{os.getpid()}"
    pid = os.posix_spawn(command[0], command, {**os.environ, OWNER: token}, setsid=True)
    process = Process(pid, token)
    try:
        ended = is_readable(process.pidfd, SETTLE_S)
        process.end(0.0)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    finally:
        os.close(process.pidfd)
    return status if ended else -1


def is_readable(descriptor: int, within_s: float) -> bool:
    """Whether *descriptor* can be read from within so many seconds; of a process: whether it has ended."""
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(math.ceil(within_s * 1000)))


def _complain(text: str) -> None:
    """Write to stderr, unless that would wait for its reader, or has none."""
    poll = select.poll()
    poll.register(2, select.POLLOUT)
    try:
        if poll.poll(0):
            os.write(2, f"{text}\n".encode())
    except OSError:
        pass


def _state_of(pid: int) -> str:
    """The kernel's letter for the state of a process's first thread; empty when there is none."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b") ")[2][:1].decode()
    except OSError:
        return ""


def _wait_until(is_so: "Callable[[], bool]", within_s: float) -> bool:
    until = time.monotonic() + within_s
    while not _tried(is_so):
        if time.monotonic() >= until:
            return False
        time.sleep(LOOK_S)
    return True


def _tried(is_so: "Callable[[], bool]") -> bool:
    try:
        return is_so()
    except OSError:  # no descriptor to be had, for example
        return False


def _prepare(pipes: list[int]) -> None:
    """Signals as they are needed here, no pipe for our children, and three streams that nobody else's file can be."""
    for number in IGNORED:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    while (opened := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(opened, True)
    os.close(opened)
    for descriptor in pipes:
        os.set_inheritable(descriptor, False)


def main(arguments: list[str]) -> None:
    """Guard a daemon.

    Args:
        arguments: Descriptors to read from and to write to, the daemon's
            process id and token, and the command that settles open runs.
    """
    inbox, outbox, pid, token, *command = arguments
    _prepare([int(inbox), int(outbox)])
    daemon = Process(int(pid), token)
    if os.getppid() != daemon.pid:  # gone already, and its number perhaps somebody else's
        daemon.pidfd = -1
    watch = Watch(int(inbox), int(outbox))
    reason = watch.wait()
    if reason is not None:
        daemon.end(LEAVING_S if reason == ENDED else 0.0)
        command += ["--because", reason, "--daemon", pid, "--frozen", ",".join(watch.leases)]
        settle(command, PAUSE_S if watch.leases else LONGEST_PAUSE_S)


if __name__ == "__main__":
    main(sys.argv[1:])
