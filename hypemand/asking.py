"""Where the answers of commands come from: a daemon that is asked, or its files and backends."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Generic, TypeVar

from attrs import field, frozen

from hypemand.commands import CommandError, StateUnreadableError, load, log_trouble, warn

if TYPE_CHECKING:
    from hypemand.config import Config
    from hypemand.surface.client import NoAnswerError
    from hypemand.surface.documents import Document
    from hypemand.surface.known import State
    from hypemand.surface.report import Overview

T = TypeVar("T")


@frozen
class Answer(Generic[T]):
    """An answer, and why the daemon did not give it, where it did not."""

    content: T
    silent: "NoAnswerError | None" = None


@frozen
class Asked:
    """Whom a report is to be had from, and of which instance.

    Attributes:
        config: What the file has, or most likely means where it is *invalid*.
    """

    path: Path
    config: "Config"
    instance: str | None
    problems: tuple[str, ...] = field(default=())

    @classmethod
    def by(cls, options: argparse.Namespace) -> "Asked":
        """As the arguments say."""
        from hypemand.config_files import guess_config

        path, config, problems = load(options)
        guessed = config or guess_config(path.read_bytes(), path.absolute().parent)
        return cls(path, guessed, options.instance, tuple(f"{path}: {problem}" for problem in problems))

    def ask(
        self, document: str, read: "Callable[[Document], T]", from_files: "Callable[[Asked], Document]"
    ) -> Answer[T]:
        """What *read* makes of *document*, the daemon's own or one *from_files*.

        Raises:
            CommandError: Neither is to be had.
        """
        from hypemand.core.errors import InvalidInput
        from hypemand.surface.client import Client, NoAnswerError, Silence, find_socket

        client = Client(find_socket(self.path, self.config))
        try:
            told = client.get(f"/control/{document}", instance=self.instance)
            try:
                return Answer(read(told))
            except (InvalidInput, LookupError, TypeError, ValueError, AttributeError) as error:
                raise NoAnswerError(Silence.STRANGE, client.path) from error
        except NoAnswerError as error:
            silent = error
        try:
            return Answer(read(from_files(self)), silent)
        except OSError as error:
            raise StateUnreadableError(error, self.config.state_dir, silent) from None

    def unknown(self, what: str) -> CommandError:
        """That there is nothing of the instance."""
        return CommandError(f"no {what} an instance {self.instance!r}; see: hypemand status")


def overview_from_files(asked: Asked) -> "Overview":
    """Everything about the instances, by backends of our own."""
    import trio

    from hypemand.surface.report import look_offline

    return trio.run(look_offline, state_from_files(asked), None if asked.problems else asked.config, asked.instance)


def state_from_files(asked: Asked) -> "State":
    """What is in the state directory."""
    from hypemand.surface.known import read_state

    if asked.problems:
        warn([f"{asked.path} is invalid; this is the state in {asked.config.state_dir}"])
    log_trouble()
    return read_state(asked.config.state_dir)


def tell_silence(asked: Asked, silent: "NoAnswerError | None") -> None:
    """That a daemon is there, but was not the one to answer."""
    from hypemand.state.lock import lock_owner
    from hypemand.surface.client import Silence

    if silent is None:
        return
    owner = lock_owner(asked.config.state_dir)
    if owner is not None and owner.role == "daemon":
        warn([f"{owner} gives no answer over its socket; this is from its files. {silent}"])
    elif silent.why is not Silence.ABSENT:
        warn([f"no answer over the daemon's socket; this is from the files. {silent}"])
