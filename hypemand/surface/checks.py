"""What ``check-config`` finds beyond the file itself: tokens, TLS, backends that don't answer, entries in conflict."""

from attrs import define, field

from hypemand.config import Config, HooksConfig
from hypemand.core.errors import InvalidInput, Problem
from hypemand.core.model import ManagedBy
from hypemand.engine.fleet import Fleet, new_fleet
from hypemand.engine.reconcile import discover, wanted_schedules
from hypemand.surface.hooks.hooks import command_trouble
from hypemand.surface.http.access import read_access
from hypemand.surface.instance_checks import InstanceChecks
from hypemand.surface.known import State, read_state
from hypemand.surface.report import NEVER_USED


@define
class Findings:
    """Problems, which an operator has to mend, and warnings, which may be as wanted."""

    problems: list[Problem] = field(factory=list)
    warnings: list[str] = field(factory=list)


async def check_backends(config: Config, *, instances: bool = True) -> Findings:
    """Read the files that *config* names, and compare what its backends have with its schedules. Changes nothing.

    Args:
        instances: Whether to look at each scheduled instance, too.
    """
    findings = Findings()
    try:
        if config.api.listen is not None:
            read_access(config.api)
    except InvalidInput as error:
        findings.problems += error.problems
    fleet = new_fleet(config.state_dir)
    fleet.have(config.backends)
    try:
        await _check_fleet(config, fleet, findings, instances=instances)
    finally:
        await fleet.aclose()
    return findings


async def _check_fleet(config: Config, fleet: Fleet, findings: Findings, *, instances: bool) -> None:
    discovery = await discover(fleet.backends)
    findings.warnings += _hook_warnings(config.hooks)
    try:
        state = read_state(config.state_dir)
    except OSError as error:
        findings.problems.append(Problem("state_dir", f"can't be read: {error}"))
        return
    for name, trouble in sorted(discovery.errors.items()):
        first = "" if name in state.used_backends else NEVER_USED
        findings.warnings.append(f"backends.{name}: {trouble}{first}")
    wanted = wanted_schedules(config, discovery, state.schedules.values())
    findings.problems += [Problem("schedules", problem) for problem in wanted.problems]
    findings.problems += _claimed_twice(config, state)
    for index, entry in enumerate(config.schedules):
        if entry.is_pattern and not any(held is entry for held, _ in wanted.entries.values()):
            findings.warnings.append(
                f"schedules[{index}].instance: no instance matches {entry.instance!r} at the moment"
            )
    if instances:
        scheduled = [
            (instance, name)
            for instance, (entry, name) in wanted.entries.items()
            if entry.enabled and name in discovery.instances
        ]
        findings.warnings += await InstanceChecks(fleet.backends, state.used_backends).warnings(scheduled)


def _hook_warnings(hooks: HooksConfig) -> list[str]:
    commands = {"on_failure": hooks.on_failure, "on_success": hooks.on_success}
    troubles = {name: command_trouble(command) for name, command in commands.items() if command}
    return [f"hooks.{name}: {trouble}" for name, trouble in troubles.items() if trouble]


def _claimed_twice(config: Config, state: State) -> list[Problem]:
    made_elsewhere = {i for i, s in state.schedules.items() if s.managed_by is ManagedBy.API}
    return [
        Problem(
            f"schedules[{index}].instance",
            f"{entry.instance!r} has a schedule made over the API,"
            f" schedules/{entry.instance}.json in the state directory; remove one of both",
        )
        for index, entry in enumerate(config.schedules)
        if entry.instance in made_elsewhere
    ]
