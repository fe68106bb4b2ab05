"""Noticing that the config file was edited."""

from collections.abc import Awaitable, Callable
from pathlib import Path

import trio
from attrs import frozen

from hypemand.engine.looking import until
from hypemand.state.files import Signature


@frozen
class Tempo:
    """How often to look, how long a file must not have changed, and how long to wait for that at most; seconds.

    Looking is most of what an idle daemon does: it is done more often only once an edit has begun.
    """

    poll_s: float = 2.0
    quiet_s: float = 2.0
    longest_s: float = 10.0


NOT_KNOWN = Signature(0, 0, 0)


async def watch_file(
    path: Path,
    on_edit: Callable[[], Awaitable[None]],
    tempo: Tempo | None = None,
    known: Signature | None = NOT_KNOWN,
) -> None:
    """Call *on_edit* each time that *path* was changed, replaced, made or removed, once that is over.

    An edit is over when the file has not changed for a while: an editor may
    empty it first, and write it in pieces.

    Args:
        known: The version that counts as not changed; left out, the one that is there now.
    """
    tempo = tempo or Tempo()
    if known == NOT_KNOWN:
        known = await _signature(path)
    while True:
        await _until_changed(path, known, tempo)
        known = await _until_quiet(path, await _signature(path), tempo)
        await on_edit()


async def _until_changed(path: Path, known: Signature | None, tempo: Tempo) -> None:
    await until(lambda: file_version(path) != known, tempo.poll_s)


async def _until_quiet(path: Path, seen: Signature | None, tempo: Tempo) -> Signature | None:
    first_seen = changed_at = trio.current_time()
    while True:
        await trio.sleep(min(tempo.poll_s, tempo.quiet_s / 4))
        latest = await _signature(path)
        now = trio.current_time()
        if latest != seen:
            seen, changed_at = latest, now
        if now - changed_at >= tempo.quiet_s or now - first_seen >= tempo.longest_s:
            return seen


async def _signature(path: Path) -> Signature | None:
    # Abandoned, so that a filesystem that hangs does not hold up the end of hypemand.
    return await trio.to_thread.run_sync(file_version, path, abandon_on_cancel=True)


def file_version(path: Path) -> Signature | None:
    """Which version of *path* is there now; None where there is none. Blocking."""
    try:
        return Signature.of(path.stat())
    except OSError:
        return None
