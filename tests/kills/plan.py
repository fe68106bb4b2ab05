"""Which kills there are to be: the matrix that misses no step, and any number of random ones."""

import random
from collections.abc import Iterable, Sequence

from tests.kills.places import OF_RECOVERY, By, How, Kill, Phase, Relapse

SAMPLE = 3
"""Of the places around the freeze, besides every step."""
SHORTEST_S, LONGEST_S = 0.0002, 0.2
"""Of the delays inside a step; its length is not known, so they are spread over orders of magnitude."""


def a_kill(
    rng: random.Random,
    step: str,
    phase: Phase | None = None,
    *,
    how: How = How.KILLED,
    by: By = By.RECOVER,
    operator: bool = False,
    relapse: bool = False,
) -> Kill:
    """A kill at *step*, at a random instant if it is inside; *phase* too is random if not given."""
    phase = phase or rng.choice(list(Phase))
    after_s = _delay_s(rng) if phase is Phase.IN else 0.0
    again = Relapse(rng.choice(OF_RECOVERY), rng.choice(list(Phase)), _delay_s(rng)) if relapse else None
    return Kill(step, phase, how, by, after_s, operator, again)


def _delay_s(rng: random.Random) -> float:
    return float(SHORTEST_S * (LONGEST_S / SHORTEST_S) ** rng.random())


def matrix(rng: random.Random, steps: Sequence[str], *, guard: bool = True) -> list[Kill]:
    """Every one of *steps*, each way of settling, each way to come to harm, in random order.

    What is not in it, random kills come to: the tests are to end in time.

    Args:
        guard: Whether there is one; else `recover` settles all.
    """
    turn = rng.randrange(2)

    def by(number: int) -> By:
        return By.GUARD if guard and (number + turn) % 2 else By.RECOVER

    kills = [a_kill(rng, step, by=by(number)) for number, step in enumerate(steps)]
    hurts = rng.sample(list(_where_it_hurts(steps)), SAMPLE)
    kills += [a_kill(rng, *place, by=by(n)) for n, place in enumerate(hurts)]
    kills += [a_kill(rng, *_before_the_freeze(steps, rng), by=by(n), operator=True) for n in range(2)]
    kills.append(a_kill(rng, rng.choice(("capture", "publish")), Phase.AFTER, relapse=True))
    kills.append(a_kill(rng, "capture", Phase.IN, how=How.STOPPED, by=By.RECOVER))
    if guard:
        kills += [
            a_kill(rng, *rng.choice((("capture", Phase.IN), (rng.choice(steps), None))), by=by)
            for by in (By.BOTH, By.RESTART)
        ]
        kills += [
            a_kill(rng, *_where_it_freezes(steps), how=How.STOPPED, by=By.GUARD),
            a_kill(rng, "capture", Phase.IN, how=How.BLOCKED, by=By.GUARD),
            a_kill(rng, rng.choice(("prepare", "list", "record")), how=How.STOPPED, by=By.GUARD),
        ]
    rng.shuffle(kills)
    return kills


def _where_it_hurts(steps: Sequence[str]) -> Iterable[tuple[str, Phase]]:
    """Around the freeze: where the guest stands still, or what there is of a snapshot is partial."""
    places = [
        ("pause", Phase.IN),
        ("pause", Phase.AFTER),
        ("capture", Phase.IN),
        ("capture", Phase.AFTER),
        ("resume", Phase.IN),
        ("complete", Phase.IN),
        ("publish", Phase.IN),
        ("delete", Phase.IN),
    ]
    return [(step, phase) for step, phase in places if step in steps]


def _where_it_freezes(steps: Sequence[str]) -> tuple[str, Phase]:
    """Where the guest stands still until somebody resumes it. Later QEMU may do that by itself."""
    return ("pause", Phase.AFTER) if "pause" in steps else ("capture", Phase.IN)


def _before_the_freeze(steps: Sequence[str], rng: random.Random) -> tuple[str, Phase]:
    places = [("claim", Phase.AFTER), ("make ready", Phase.AFTER), ("look", Phase.BEFORE), ("look", Phase.AFTER)]
    places.append(("pause", Phase.BEFORE) if "pause" in steps else ("capture", Phase.BEFORE))
    return rng.choice([place for place in places if place[0] in steps])


def random_kill(rng: random.Random, steps: Sequence[str], *, guard: bool = True) -> Kill:
    """Any kill: one in three around the freeze, one in twenty hung, some with an operator's pause or a recovery
    that is killed, too.
    """
    by = rng.choice((By.GUARD, By.GUARD, By.BOTH, By.RESTART, By.RECOVER, By.RECOVER)) if guard else By.RECOVER
    lot = rng.random()
    if lot < 0.05:
        by = By.GUARD if by is By.RESTART else by
        return a_kill(rng, *_before_the_freeze(steps, rng), by=by, operator=True)
    step, phase = rng.choice(list(_where_it_hurts(steps))) if rng.random() < 1 / 3 else (rng.choice(steps), None)
    if lot < 0.1:
        if by is By.RECOVER:
            return a_kill(rng, step, phase, how=How.STOPPED)
        return a_kill(rng, step, phase, how=rng.choice((How.STOPPED, How.BLOCKED)), by=By.GUARD)
    return a_kill(rng, step, phase, by=by, relapse=by is By.RECOVER and lot < 0.2)
