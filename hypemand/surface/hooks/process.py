"""The process of a hook: started, fed, read and ended. Nothing that it does takes the daemon's time or its exit."""

import fcntl
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

import trio
from attrs import define, field, frozen

from hypemand.engine.children import watched
from hypemand.surface.hooks import start as hook_start

OUTPUT_BYTES = 16 * 1024
OUTPUT_LINES = 200
"""So much of a command's output is kept, from its begin."""
LONGEST_LINE = 2000
_DRAIN_S = 0.2
"""How long what is in the pipe at the end of a command may take to be read."""
_READ_BYTES = 65536
_BREATH_S = 0.01
"""Between two reads of output that nobody is going to see: whoever writes without end gets no more of our time."""


@define
class Output:
    """The first part of what a command has written; the rest is counted."""

    kept: bytearray = field(factory=bytearray)
    left_out: int = 0

    def take(self, data: bytes) -> None:
        """Take in what came next."""
        room = OUTPUT_BYTES - len(self.kept)
        self.kept += data[:room]
        self.left_out += len(data[room:])

    @property
    def is_full(self) -> bool:
        """Whether nothing more is kept."""
        return len(self.kept) >= OUTPUT_BYTES

    def lines(self) -> list[str]:
        """What is worth showing, with nothing in it that steers a terminal."""
        shown = [
            line
            for raw in bytes(self.kept).splitlines()
            if (line := harmless(raw.decode(errors="backslashreplace"))).strip()
        ]
        cut = [line if len(line) <= LONGEST_LINE else f"{line[:LONGEST_LINE]}..." for line in shown[:OUTPUT_LINES]]
        more = f", {len(shown) - OUTPUT_LINES} lines" if len(shown) > OUTPUT_LINES else ""
        return [*cut, f"... and {self.left_out} bytes{more} more"] if self.left_out or more else cut


def harmless(text: str) -> str:
    """*text* in one line, with nothing in it that steers a terminal."""
    return "".join(c if c.isprintable() or c == "\t" else c.encode("unicode_escape").decode() for c in text)


@frozen(eq=False)
class HookProcess:
    """A command that runs, as the leader of a session and a group of its own.

    Its number stays its own, and its group's, until `close`: only then may the
    system give it to another process.
    """

    pid: int
    pidfd: int
    stdin: trio.lowlevel.FdStream
    stdout: trio.lowlevel.FdStream
    output: Output = field(factory=Output)
    drained: trio.Event = field(factory=trio.Event)

    async def feed(self, document: bytes) -> None:
        """Write its stdin. It need not read that."""
        with suppress(trio.BrokenResourceError):
            await self.stdin.send_all(document)
        await self.stdin.aclose()

    async def listen(self) -> None:
        """Read what it and its children write, until none of them can write any more."""
        with suppress(trio.BrokenResourceError):
            while data := await self.stdout.receive_some(_READ_BYTES):
                self.output.take(data)
                if self.output.is_full:
                    await trio.sleep(_BREATH_S)
        self.drained.set()

    async def ended(self) -> int:
        """Its exit status once it has ended, negative for a signal, and all that it wrote has been read."""
        await trio.lowlevel.wait_readable(self.pidfd)
        with trio.move_on_after(_DRAIN_S):
            await self.drained.wait()
        how = os.WEXITED | os.WNOWAIT | os.WNOHANG
        result = os.waitid(os.P_PIDFD, self.pidfd, how)  # noqa: ASYNC222 - it has ended
        assert result is not None
        return result.si_status if result.si_code == os.CLD_EXITED else -result.si_status

    def has_left_others(self) -> bool:
        """Whether other processes of its group live on."""
        processes = {int(name) for name in os.listdir("/proc") if name.isdigit()}  # noqa: PTH208 - names, and many
        return any(_lives_in(self.pid, pid) for pid in processes - {self.pid})

    def kill(self) -> None:
        """End its whole group at once."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)

    async def over(self) -> None:
        """Return once it has ended; where it hangs in the kernel, that may be never."""
        await trio.lowlevel.wait_readable(self.pidfd)

    def close(self) -> None:
        """Let go of its pipes, and of its number, if it has ended."""
        with suppress(ChildProcessError):
            os.waitpid(self.pid, os.WNOHANG)
        self.stdin.close()
        self.stdout.close()
        os.close(self.pidfd)


def _lives_in(group: int, pid: int) -> bool:
    try:
        if os.getpgid(pid) != group:
            return False
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(") ")[2][:1] not in ("Z", "X")
    except OSError:
        return False  # gone


def start(command: Sequence[bytes], environment: Mapping[bytes, bytes]) -> HookProcess:
    """Start *command* with *environment*, and with nothing else that is ours.

    Raises:
        OSError: No process, or no descriptor, is to be had.
    """
    with ExitStack() as theirs, ExitStack() as ours:
        their_in, our_in = os.pipe()
        our_out, their_out = os.pipe()
        for stack, descriptor in ((theirs, their_in), (ours, our_in), (ours, our_out), (theirs, their_out)):
            stack.callback(os.close, descriptor)
        pid = _spawn(command, environment, their_in, their_out)
        pidfd = watched(pid)
        ours.pop_all()
    return HookProcess(pid, pidfd, trio.lowlevel.FdStream(our_in), trio.lowlevel.FdStream(our_out))


def _spawn(command: Sequence[bytes], environment: Mapping[bytes, bytes], stdin: int, stdout: int) -> int:
    first: list[str | bytes] = [sys.executable, "-I", "-S", hook_start.__file__]
    with ExitStack() as copies:
        # Away from the low numbers first: one must not be overwritten before it is copied itself.
        high = []
        for descriptor in (stdin, stdout):
            high.append(fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, 64))
            copies.callback(os.close, high[-1])
        return os.posix_spawn(
            sys.executable,
            [*first, *command],
            environment,
            file_actions=[
                (os.POSIX_SPAWN_DUP2, here, there) for here, there in zip((*high, high[1]), (0, 1, 2), strict=True)
            ],
            setsid=True,
        )
