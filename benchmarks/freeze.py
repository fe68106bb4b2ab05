"""How long a guest stands still for a snapshot: QEMU alone, hypemand's modes, and libvirt, side by side.

Run it from a checkout, on an otherwise idle machine with `qemu-system-x86_64`
and `qemu-img`; virsh and libvirtd are used where they are installed::

    .venv/bin/python -m benchmarks.freeze
    .venv/bin/python -m benchmarks.freeze --runs 15 --json > freeze.json

One guest (software emulation, RAM without zero pages) is captured in turns:
by a bare `snapshot-save`, and by the qemu backend in each of its modes, called
as a run of hypemand calls it. libvirt has a second guest like it; the guest
whose turn it is not is stopped. A freeze is the time from QEMU's STOP event to
its RESUME event, by QEMU's own clock, seen on a monitor that nobody else uses.
Deleting is not part of it.

So that no way is favoured: each has one round to warm up, in which the disk
grows; each snapshot is deleted before the next; what is not yet on the disk is
written before each; the order turns from round to round, every other one backwards.
"""

import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, contextmanager
from pathlib import Path

import structlog
import trio

from benchmarks.engine_freeze import EngineReport, EngineRounds
from benchmarks.engine_hypeman import HypemanSubject
from benchmarks.engine_libvirt import LibvirtSubject
from benchmarks.engine_subjects import SUBJECTS
from benchmarks.engine_vmm import VMM_SUBJECTS
from benchmarks.freeze_options import Options, parse_options
from benchmarks.freeze_report import BACKGROUND, BARE, INTERNAL, TITLES, VIRSH, Report, Row
from benchmarks.freeze_rounds import Rounds, Turn, tell
from benchmarks.freeze_ways import QmpGuest
from benchmarks.libvirt_guest import virsh_way
from benchmarks.ruler import NotMeasuredError, Stage, Way, dial
from tests.libvirt_site import missing_parts
from tests.processes import Lab
from tests.qemu_guest import running_guest

INTERRUPTED = 130
_Openers = Mapping[str, Callable[[], AbstractAsyncContextManager[Way]]]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; the exit status says whether everything ran, not whether a goal is met."""
    options = parse_options(argv)
    if missing := [name for name in ("qemu-system-x86_64", "qemu-img") if shutil.which(name) is None]:
        tell(f"{' and '.join(missing)} not found; on Debian: apt-get install qemu-system-x86 qemu-utils")
        return 1
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    report = trio.run(_run, options)
    if report is None:
        return INTERRUPTED
    print(json.dumps(report.document(), indent=2) if options.as_json else report.table())
    return 1 if report.failed else 0


async def _run(options: Options) -> Report | EngineReport | None:
    """The report; None when a signal came first. Either way, everything that was started has ended."""
    report: Report | EngineReport | None = None
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM, signal.SIGHUP) as signals:
        async with trio.open_nursery() as nursery:
            measuring = trio.CancelScope()
            # It listens on while things are cleared up: a second Ctrl-C must not break into that.
            nursery.start_soon(_cancel_at, signals, measuring)
            with measuring, _scratch(options.directory) as directory:
                report = await (_measure_engine if options.engine else _measure)(options, directory)
            nursery.cancel_scope.cancel()
    return report


async def _cancel_at(signals: AsyncIterator[int], measuring: trio.CancelScope) -> None:
    async for number in signals:
        tell(f"{signal.Signals(number).name}: clearing up")
        measuring.cancel()


@contextmanager
def _scratch(parent: Path) -> Iterator[Path]:
    directory = Path(tempfile.mkdtemp(prefix="hypemand-freeze-", dir=parent))
    directory.chmod(0o711)  # libvirt's guest has its disk in there
    try:
        yield directory
    finally:
        # What an abandoned thread of the backend still writes would stop one attempt.
        for _ in range(20):
            shutil.rmtree(directory, ignore_errors=True)
            if not directory.exists():
                break
            time.sleep(0.05)


async def _measure_engine(options: Options, directory: Path) -> EngineReport:
    async with AsyncExitStack() as stack:
        openers = [
            *SUBJECTS,
            *VMM_SUBJECTS,
            HypemanSubject.running,
            *(() if missing_parts() else [LibvirtSubject.running]),
        ]
        subjects = [await stack.enter_async_context(opener(directory)) for opener in openers]
        return await EngineRounds(subjects, options.runs).measure(Lab(directory))


async def _measure(options: Options, directory: Path) -> Report:
    load = os.getloadavg()[0]
    rows = [Row(way) for way in options.ways]
    async with AsyncExitStack() as stack:
        openers = await _openers(stack, options, directory)
        turns = [turn for row in rows if (turn := await _turn(stack, openers, row)) is not None]
        version = await _qemu_version(turns)
        await Rounds(turns, options).all()
    return Report(
        qemu_version=version,
        memory_mb=options.memory_mb,
        runs=options.runs,
        cpus=len(os.sched_getaffinity(0)),
        load=load,
        whole_pages=options.whole_pages,
        rows=rows,
    )


async def _openers(stack: AsyncExitStack, options: Options, directory: Path) -> _Openers:
    openers: dict[str, Callable[[], AbstractAsyncContextManager[Way]]] = {
        VIRSH: lambda: virsh_way(directory, memory_mb=options.memory_mb)
    }
    if set(options.ways) != {VIRSH}:
        shared = await stack.enter_async_context(_qmp_guest(options, directory))
        openers[BARE] = shared.bare
        openers[INTERNAL] = lambda: shared.hypemand("internal")
        openers[BACKGROUND] = lambda: shared.hypemand("background")
    return openers


@asynccontextmanager
async def _qmp_guest(options: Options, directory: Path) -> AsyncIterator[QmpGuest]:
    tell(f"starting a guest with {options.memory_mb} MB")
    async with (
        running_guest(directory, memory_mb=options.memory_mb, filled=True) as guest,
        dial(guest.test_socket) as monitor,
    ):
        yield QmpGuest(guest, Stage(monitor, guest.log, guest.process.pid), directory)


async def _turn(stack: AsyncExitStack, openers: _Openers, row: Row) -> Turn | None:
    """Get a way ready; where that can't be, its row says why."""
    tell(f"getting ready: {TITLES[row.way]}")
    try:
        way = await stack.enter_async_context(openers[row.way]())
    except NotMeasuredError as error:
        row.note = str(error)
    except Exception as error:  # noqa: BLE001 - the boundary of a way: one that breaks leaves the others to be measured
        row.fail(error)
    else:
        return Turn(way, row)
    tell(f"{TITLES[row.way]}: {row.note}")
    return None


async def _qemu_version(turns: Sequence[Turn]) -> str:
    if not turns:
        return "(none was started)"
    version = (await turns[0].way.stage.monitor.ask("query-version"))["qemu"]
    return f"{version['major']}.{version['minor']}.{version['micro']}"


if __name__ == "__main__":
    sys.exit(main())
