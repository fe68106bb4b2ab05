"""Short blocking work, such as reading a small file, when much of it is asked for at once.

To hand work to a thread and to hear of its end costs more than such work
itself; so what is asked while the threads are busy is done in one go.
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice
from typing import Any, TypeVar

import trio
from attrs import Factory, define, field

T = TypeVar("T")
AT_ONCE = 50
"""So many questions at most are one thread's, so that slow ones are spread over several."""


@define(eq=False)
class _Question:
    work: Callable[[], Any]
    answered: trio.Event = Factory(trio.Event)
    answer: Any = None
    error: BaseException | None = None

    def do(self) -> None:
        try:
            self.answer = self.work()
        except BaseException as error:  # noqa: BLE001 - it is whoever asked that has to know
            self.error = error


@define(eq=False)
class Questions:
    """Answers questions in threads of its own. Whoever asks may give up waiting; work that has begun is done then.

    Attributes:
        threads: So many work at once.
    """

    threads: int = 8
    _limiter: trio.CapacityLimiter | None = field(init=False, default=None)
    _waiting: dict[_Question, None] = field(init=False, factory=dict)
    _busy: int = field(init=False, default=0)

    async def ask(self, work: Callable[..., T], *args: Any) -> T:
        """What *work* returns or raises. It changes nothing, and has to be quick."""
        self._limiter = self._limiter or trio.CapacityLimiter(self.threads)
        question = _Question(partial(work, *args))
        self._waiting[question] = None
        if self._busy < self.threads:
            self._busy += 1
            # Nobody's own task: who asked first may be cancelled, and the others still want to know.
            trio.lowlevel.spawn_system_task(self._answer)
        try:
            await question.answered.wait()
        finally:  # while all threads hang nobody takes it, and there may come any number
            self._waiting.pop(question, None)
        if question.error is not None:
            raise question.error
        answer: T = question.answer
        return answer

    async def _answer(self) -> None:
        try:
            while self._waiting:
                mine = list(islice(self._waiting, AT_ONCE))
                for question in mine:
                    del self._waiting[question]
                try:
                    await trio.to_thread.run_sync(_do_all, mine, abandon_on_cancel=True, limiter=self._limiter)
                except RuntimeError as error:  # there are no more threads to be had
                    for question in mine:
                        question.error = error
                for question in mine:
                    question.answered.set()
        finally:
            self._busy -= 1


def _do_all(questions: Sequence[_Question]) -> None:
    for question in questions:
        question.do()
