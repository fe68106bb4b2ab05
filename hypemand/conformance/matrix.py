"""Every fault at every step of a run: one good run, one with the fault, and one good run again."""

from functools import partial
from pathlib import Path

import trio

from hypemand.conformance.aftermath import check_next, check_order
from hypemand.conformance.bench import Bench, Running
from hypemand.conformance.faults import FAULTS, KILLS, Fault, Scene
from hypemand.conformance.steps import STEPS, Step, trap_of
from hypemand.conformance.subject import Case, Subject, Traits
from hypemand.conformance.victim import run_victim


def fault_cases() -> list[Case]:
    """A case for each fault and each step."""
    here = [
        Case(f"fault-{fault.name}-in-{step.name}", partial(_fault, step, fault), partial(_applies, step, fault))
        for step in STEPS
        for fault in FAULTS
    ]
    elsewhere = [
        Case(f"fault-{kill}-{step.name}", partial(_kill, step, kill), step.is_in_runs)
        for step in STEPS
        for kill in KILLS
    ]
    return [*here, *elsewhere]


def _applies(step: Step, fault: Fault, traits: Traits) -> bool:
    return step.is_in_runs(traits) and fault.is_possible(step, traits)


def _bench_of(subject: Subject, directory: Path) -> Bench:
    backend = subject.backend
    return Bench(directory / "state", backend.name, backend.connection, subject.surroundings, subject.instance)


async def _fault(step: Step, fault: Fault, subject: Subject, directory: Path) -> None:
    bench = _bench_of(subject, directory)
    async with bench.engine() as running:
        async with trio.open_nursery() as aside:
            await running.runs_are_over(1)
            happens = partial(fault.happens, Scene(subject, running, aside))
            trap = trap_of(step, happens)
            await running.begin_run(trap)
            await running.runs_are_over(2)
            assert trap.sprung, f"the run did not come to {step.name}: {bench.history()[-1].error}"
        if not fault.ends_engine:
            return await _next_run(step, subject, running, paused=fault.operator)
    return await _next_engine(step, subject, bench)


async def _kill(step: Step, kill: str, subject: Subject, directory: Path) -> None:
    bench = _bench_of(subject, directory)
    told = await run_victim(bench, step, kill)
    assert told == "", f"the run did not come to {step.name}: {told}"
    await _next_engine(step, subject, bench)


async def _next_engine(step: Step, subject: Subject, bench: Bench) -> None:
    """What a daemon finds that is started anew."""
    async with bench.engine() as running:
        await running.runs_are_over(2)
        await _next_run(step, subject, running)


async def _next_run(step: Step, subject: Subject, running: Running, *, paused: bool = False) -> None:
    assert await subject.guest_runs() != paused, (
        "an operator's pause was undone" if paused else "the guest stands still"
    )
    await check_order(subject, running.bench, step)
    if paused:
        await subject.operator_resumes()
    await running.begin_run()
    await running.runs_are_over(3)
    await check_next(subject, running.bench)
