"""The guard: a small process that has guests thawed when the daemon that froze them can't.

A program of its own, started by its path: it imports a few modules of the
standard library and nothing else, to live in a few megabytes. `guarding`
starts it and is the other end of its two pipes, which carry lines:

- from the daemon: ``freeze RUN DEADLINE`` (of the monotonic clock, in
  seconds), ``thawed RUN``, ``pong``, ``goodbye``;
- to the daemon: ``hello``, ``ack RUN``, ``ping``.

A daemon that answers keeps the duty to thaw, whatever its deadlines. One that
does not is killed, for two at once would tear a copy or thaw the next run's
freeze. Then the state lock is taken and a fresh process settles all open runs.
"""

import fcntl
import os
import select
import signal
import sys
import time

TYPE_CHECKING = False
if TYPE_CHECKING:  # `typing` and `collections` would take a megabyte
    from collections.abc import Callable

PING_S = 0.2
"""How often the daemon is pinged near and after a deadline; further away once a second."""
CALM_PING_S = 1.0
ANSWER_S = 0.5
"""How old a ping may be after a deadline before the daemon counts as hung."""
HUNG_S = 5.0
"""The same before any deadline."""
ASLEEP_S = 1.0
"""A guard that wakes so much too late was stopped itself, and the daemon perhaps with it."""
WAKING_S = 2.0
"""What the daemon then gets on top."""
LEAVING_S = 1.0
"""What a daemon gets that has closed its pipe and does not end."""
DYING_S = 5.0
CHILDREN_S = 2.0
LEFTOVER_S = 0.5
LOOK_S = 0.01
SETTLE_S = 60.0
LONGEST_PAUSE_S = 30.0
LOCK_DESCRIPTOR = 3
"""Of the lock, in the process that settles."""

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
        self.said_goodbye = False
        self.pinged_at: float | None = None
        self._next_ping = 0.0
        self._looked_at = time.monotonic()

    def wait(self) -> str | None:
        """Watch until somebody else has to act.

        Returns:
            Why; None after a goodbye.
        """
        self._tell("hello")
        while not self.said_goodbye:
            wait_s = self._wait_s(self._now(0.0))
            if self._poll.poll(None if wait_s is None else wait_s * 1000):
                data = os.read(self._inbox, 65536)
                if not data:
                    return ENDED
                self._take(data)
                continue  # all that it said comes before any verdict
            now = self._now(wait_s or 0.0)
            if self._is_hung(now):
                return f"the daemon did not answer for {now - (self.pinged_at or now):.1f} s"
            self._ping(now)
        return None

    def _now(self, expected_s: float) -> float:
        """The time. Where it is much later than *expected_s* after the last look, nobody here was awake."""
        now = time.monotonic()
        if self.pinged_at is not None and now > self._looked_at + expected_s + ASLEEP_S:
            self.pinged_at = now + WAKING_S
        self._looked_at = now
        return now

    def _first_deadline(self) -> float:
        return min(self.leases.values())

    def _hung_at(self, pinged_at: float) -> float:
        return min(pinged_at + HUNG_S, max(pinged_at + ANSWER_S, self._first_deadline()))

    def _wait_s(self, now: float) -> float | None:
        """Seconds until there is something to do; None: until the daemon says something."""
        if not self.leases:
            return None
        at = self._next_ping if self.pinged_at is None else self._hung_at(self.pinged_at)
        return max(0.0, at - now)

    def _is_hung(self, now: float) -> bool:
        return bool(self.leases) and self.pinged_at is not None and now >= self._hung_at(self.pinged_at)

    def _ping(self, now: float) -> None:
        if not self.leases or self.pinged_at is not None or now < self._next_ping:
            return
        self.pinged_at = now
        self._tell("ping")

    def _take(self, data: bytes) -> None:
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            word, *rest = line.decode().split()
            self._obey(word, rest)

    def _obey(self, word: str, rest: list[str]) -> None:
        now = time.monotonic()
        if word == "freeze":
            run, deadline = rest
            if not self.leases:
                self.pinged_at, self._next_ping = None, now + PING_S
            self.leases[run] = float(deadline)
            self._tell(f"ack {run}")
        elif word == "thawed":
            self.leases.pop(rest[0], None)
        elif word == "pong":
            self.pinged_at = None
            near = self.leases and self._first_deadline() - now < CALM_PING_S + ANSWER_S
            self._next_ping = now + (PING_S if near else CALM_PING_S)
        elif word == "goodbye":
            self.said_goodbye = True

    def _tell(self, line: str) -> None:
        try:
            os.write(self._outbox, f"{line}\n".encode())
        except BrokenPipeError:
            pass  # its own pipe ends with it, and that is what counts


class Daemon:
    """The process that is guarded. *token* is in the environment of every child of its that must die with it."""

    def __init__(self, pid: int, token: str) -> None:
        self.pid = pid
        self._token = f"HYPEMAND_OWNER={token}".encode()
        try:
            self._pidfd = os.pidfd_open(pid)
        except ProcessLookupError:
            self._pidfd = -1
        if os.getppid() != pid:  # gone already, and the number perhaps somebody else's
            self._pidfd = -1

    def end(self, grace_s: float) -> None:
        """Kill it and its children, and return once they can do nothing more.

        Args:
            grace_s: What it gets to end by itself.
        """
        if self._pidfd >= 0 and not _wait_until(self._is_over, grace_s):
            try:
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
            except ProcessLookupError:
                pass
            _wait_until(self._is_over, DYING_S)
        _wait_until(self._kill_children, CHILDREN_S)

    def _is_over(self) -> bool:
        """Whether its event loop is: threads that hang in a filesystem may outlive its first thread."""
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        return bool(poll.poll(0)) or _state_of(self.pid) in ("Z", "X")

    def _kill_children(self) -> bool:
        """Kill those that are left; whether there were none."""
        left = [pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if self._owns(pid)]
        for pid in left:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        return not left

    def _owns(self, pid: int) -> bool:
        try:
            with open(f"/proc/{pid}/environ", "rb") as file:
                return self._token in file.read().split(b"\0")
        except OSError:
            return False  # gone, or somebody else's


class StateLock:
    """The lock of the state directory, taken over from a daemon that is no more."""

    def __init__(self, state_dir: str, daemon: Daemon) -> None:
        self._path = f"{state_dir}/lock"
        self._daemon = daemon

    def take(self) -> int | None:
        """Wait for the lock.

        Returns:
            Its descriptor; -1 where what is left of the daemon keeps it and
            nobody else can have it; None: another daemon has it, and the duty.
        """
        left_since = None
        while True:
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                owner = self._owner(descriptor)
                os.close(descriptor)
            else:
                self._sign(descriptor)
                return descriptor
            now = time.monotonic()
            if owner == ("daemon", self._daemon.pid):
                # A thread of it that hangs in a filesystem, or a child that inherited the file by mistake. Or a new
                # owner, who is about to write its name.
                left_since = left_since or now
                if now > left_since + LEFTOVER_S:
                    return -1
            elif owner[0] == "daemon":
                return None
            else:
                left_since = None
            time.sleep(LOOK_S)

    @staticmethod
    def _owner(descriptor: int) -> tuple[str, int]:
        import json  # noqa: PLC0415 - only now; until here it would be a megabyte for nothing

        try:
            owner = json.loads(os.pread(descriptor, 4096, 0))
            return str(owner["role"]), int(owner["pid"])
        except (OSError, ValueError, KeyError, TypeError):
            return "", 0

    @staticmethod
    def _sign(descriptor: int) -> None:
        try:
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, b'{"role":"guard","pid":%d}\n' % os.getpid(), 0)
        except OSError:
            pass  # a full disk keeps nobody from thawing guests


def settle(lock: StateLock, command: list[str], reason: str) -> None:
    """Have *command* settle all open runs, until none is left or another daemon has the duty.

    The lock is free between the tries: a daemon that starts goes first.
    """
    pause_s = 1.0
    while True:
        try:
            descriptor = lock.take()
            if descriptor is None:
                return
            status = _run([*command, "--because", reason], descriptor)
            if descriptor >= 0:
                os.close(descriptor)
            if status == 0:
                return
        except OSError as error:  # no process or descriptor to be had, or the state directory is away
            _complain(f"hypemand guard: open runs can't be settled yet: {error}")
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)  # what could be thawed at once is; the rest may be left to others
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, LONGEST_PAUSE_S)


def _run(command: list[str], lock: int) -> int:
    """The exit status of *command*, which owns *lock* with us; killed when it takes too long."""
    actions = []
    if lock >= 0:
        command = [*command, "--lock", str(LOCK_DESCRIPTOR)]
        actions = [(os.POSIX_SPAWN_DUP2, lock, LOCK_DESCRIPTOR)]
    pid = os.posix_spawn(command[0], command, os.environ, file_actions=actions, setsid=True)
    poll = select.poll()
    poll.register(os.pidfd_open(pid), select.POLLIN)
    if not poll.poll(SETTLE_S * 1000):
        os.killpg(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _complain(text: str) -> None:
    """Write to stderr, unless that would wait for its reader."""
    poll = select.poll()
    poll.register(2, select.POLLOUT)
    if poll.poll(0):
        os.write(2, f"{text}\n".encode())


def _state_of(pid: int) -> str:
    """The kernel's letter for the state of a process's first thread; empty when there is none."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b") ")[2][:1].decode()
    except OSError:
        return ""


def _wait_until(is_so: "Callable[[], bool]", within_s: float) -> bool:
    until = time.monotonic() + within_s
    while not is_so():
        if time.monotonic() >= until:
            return False
        time.sleep(LOOK_S)
    return True


def main(arguments: list[str]) -> None:
    """Guard a daemon.

    Args:
        arguments: Descriptors to read from and to write to, the daemon's
            process id and token, its state directory, and the command that
            settles open runs.
    """
    for number in IGNORED:
        signal.signal(number, signal.SIG_IGN)
    inbox, outbox, pid, token, state_dir, *command = arguments
    for descriptor in (int(inbox), int(outbox)):
        os.set_inheritable(descriptor, False)
    daemon = Daemon(int(pid), token)
    reason = Watch(int(inbox), int(outbox)).wait()
    if reason is not None:
        daemon.end(LEAVING_S if reason == ENDED else 0.0)
        settle(StateLock(state_dir, daemon), command, reason)


if __name__ == "__main__":
    main(sys.argv[1:])
