"""Sockets that the service manager listens at and hands over: clients wait there while the daemon is restarted."""

import os
import socket
from collections.abc import Iterable, MutableMapping
from pathlib import Path
from typing import Any

import structlog
from attrs import define, evolve, field

from hypemand.surface.http.sockets import ControlSocket, adopt_control_socket

_FIRST = 3
"""The descriptor of the first one, as sd_listen_fds(3) has it."""
_log = structlog.get_logger()


@define(eq=False)
class Inherited:
    """What was handed over. The API gets copies: should it fail and begin anew, nobody else could listen there.

    Attributes:
        sockets: Those that nobody took yet.
    """

    sockets: list[socket.socket] = field(factory=list)
    _control: ControlSocket | None = field(init=False, default=None)
    _tcp: list[socket.socket] = field(init=False, factory=list)

    def take_control_socket(self, path: Path) -> ControlSocket | None:
        """The one that listens at *path*, if there is one whose file is still there. Blocking."""
        for made in [*self.sockets]:
            name = made.getsockname() if made.family == socket.AF_UNIX else None
            if isinstance(name, str) and name and os.path.realpath(name) == os.path.realpath(path):
                self.sockets.remove(made)
                try:
                    self._control = adopt_control_socket(path, made)
                except OSError:  # its file is gone: nobody finds it any more
                    made.close()
        control = self._control
        if control is not None and not control.is_lost():
            return evolve(control, socket=control.socket.dup())
        if control is not None:
            self._control = None
            control.close()
        return None

    def take_tcp(self, addresses: Iterable[tuple[Any, ...]]) -> list[socket.socket]:
        """Those that listen at one of *addresses*, which are the same each time."""
        wanted = {address[:2] for address in addresses}
        fit = [made for made in self.sockets if made.family != socket.AF_UNIX and made.getsockname()[:2] in wanted]
        self.sockets = [made for made in self.sockets if made not in fit]
        self._tcp += fit
        return [made.dup() for made in self._tcp]

    def close(self) -> None:
        """Let go of all. The service manager goes on to listen."""
        if self._control is not None:
            self._control.close()
        for made in (*self.sockets, *self._tcp):
            made.close()

    def refuse_rest(self) -> None:
        """Close what nobody took: nobody answers there, and a client had better hear so from the log than wait."""
        for made in self.sockets:
            _log.error(
                "a socket of the service manager is not used: neither api.socket nor api.listen names it",
                at=_place(made.getsockname()),
            )
            made.close()
        self.sockets.clear()


def take_inherited(environ: MutableMapping[str, str]) -> Inherited:
    """The sockets of which *environ* tells, if they are this process's; what it says of them is taken out of it."""
    pid, count = environ.pop("LISTEN_PID", ""), environ.pop("LISTEN_FDS", "")
    environ.pop("LISTEN_FDNAMES", None)
    inherited = Inherited()
    if pid != str(os.getpid()) or not count.isdecimal():
        return inherited
    for descriptor in range(_FIRST, _FIRST + int(count)):
        try:
            os.set_inheritable(descriptor, False)
            made = socket.socket(fileno=descriptor)
            listens = made.type == socket.SOCK_STREAM and made.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        except OSError as error:
            _log.error("what the service manager hands over is no socket", descriptor=descriptor, error=str(error))
            continue
        if listens and made.family in (socket.AF_UNIX, socket.AF_INET, socket.AF_INET6):
            inherited.sockets.append(made)
        else:
            _log.error("what the service manager hands over is no stream socket that listens", descriptor=descriptor)
            made.close()
    return inherited


def _place(name: object) -> str:
    if isinstance(name, tuple):
        return f"{name[0]}:{name[1]}"
    return name.decode(errors="replace") if isinstance(name, bytes) else str(name)
