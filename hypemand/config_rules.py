"""Rules of the config file that are about more than one value: what the parts of the raw document ask of each other."""

import ipaddress
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from hypemand.core.errors import Problem, RuleBroken
from hypemand.core.naming import check_instance_id

_PATTERN = re.compile(r"[A-Za-z0-9_*?\[\]!-][A-Za-z0-9._*?\[\]!-]{0,127}")


def is_pattern(instance: str) -> bool:
    """Whether *instance* of a schedule entry is a pattern, not an id."""
    return any(character in instance for character in "*?[")


def schedule_problems(raw: Mapping[str, Any]) -> Iterator[Problem]:
    """Of ``[[schedules]]`` in the whole file *raw*: instances, and backends that there are not."""
    entries = raw.get("schedules")
    tables = [entry if isinstance(entry, dict) else {} for entry in entries] if isinstance(entries, list) else []
    backends = raw.get("backends")
    known = list(backends) if isinstance(backends, dict) else []
    seen: Counter[str] = Counter()
    for index, table in enumerate(tables):
        path = f"schedules[{index}]"
        instance, backend = table.get("instance"), table.get("backend")
        if isinstance(instance, str):
            yield from _instance_problems(f"{path}.instance", instance, seen)
        if backend is None and len(known) != 1:
            several = "several backends: " + ", ".join(known) if known else "no backend"
            yield Problem(f"{path}.backend", f"is missing; the config has {several}")
        if isinstance(backend, str) and backend not in known:
            yield Problem(f"{path}.backend", f"{backend!r} is not a backend here; known: {', '.join(known) or 'none'}")


def _instance_problems(path: str, instance: str, seen: Counter[str]) -> Iterator[Problem]:
    seen[instance] += 1
    if seen[instance] == 2:
        yield Problem(path, f"{instance!r} has a schedule already: one for each instance")
    if is_pattern(instance):
        if not _PATTERN.fullmatch(instance):
            yield Problem(path, f"{instance!r} must be a pattern of A-Z a-z 0-9 . _ - * ? [ ] without a leading dot")
        return
    try:
        check_instance_id(instance)
    except RuleBroken as error:
        yield Problem(path, str(error))


def api_problems(raw: object) -> Iterator[Problem]:
    """Of the table ``[api]``: where it listens, and what that asks for."""
    listen = raw.get("listen") if isinstance(raw, dict) else None
    if not isinstance(raw, dict) or not isinstance(listen, str):
        return
    host, _, port = listen.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        yield Problem("api.listen", f'{listen!r} must be an address and a port, like "127.0.0.1:8080"')
        return
    for key in ("tls_cert", "tls_key"):
        if key not in raw and not _is_loopback(host.strip("[]")):
            yield Problem(f"api.{key}", f"is missing; {host} can be reached from other machines, so it needs TLS")


def hook_problems(raw: object) -> Iterator[Problem]:
    """Of the table ``[hooks]``: its commands."""
    for key in ("on_failure", "on_success"):
        words = raw.get(key) if isinstance(raw, dict) else None
        if not isinstance(words, list) or not words:
            continue
        if any(isinstance(word, str) and "\0" in word for word in words):
            yield Problem(f"hooks.{key}", "has a NUL, which no command can be given")
        if isinstance(words[0], str) and not words[0].startswith("/"):
            why = "a service is started with a PATH, and in a directory, other than yours"
            yield Problem(f"hooks.{key}[0]", f"{words[0]!r} must be an absolute path: {why}")


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
