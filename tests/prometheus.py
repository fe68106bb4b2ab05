"""What reads the metrics: a page taken apart, and promtool with the alert rules of the docs. A helper for tests."""

import json
import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from attrs import define, field, frozen
from prometheus_client.metrics_core import Metric
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_plain

from hypemand.surface.metrics.page import Metrics

DOCS = Path(__file__).parent.parent / "docs" / "monitoring.md"
OPENMETRICS = "application/openmetrics-text; version=1.0.0"
_FIRING = 'count by (alertname, instance_id) (ALERTS{alertstate="firing"})'

Series = tuple[str, frozenset[tuple[str, str]]]
"""Name and labels."""
Firing = Mapping[int, Sequence[tuple[str, str | None]]]
"""By minute, each alert by its name and instance."""


@frozen
class Page:
    """One scrape."""

    families: dict[str, Metric]

    @classmethod
    def plain(cls, text: bytes) -> "Page":
        """Of the text format; a metric that is told twice is an error."""
        families = [*parse_plain(text.decode())]
        by_name = {_full_name(family): family for family in families}
        assert len(by_name) == len(families), "a metric with two heads"
        return cls(by_name)

    @classmethod
    def openmetrics(cls, text: bytes) -> "Page":
        """Of OpenMetrics, whose parser is strict."""
        return cls({_full_name(family): family for family in parse_openmetrics(text.decode())})  # type: ignore[no-untyped-call]

    @property
    def samples(self) -> dict[Series, float]:
        return {
            (sample.name, frozenset(sample.labels.items())): float(sample.value)
            for family in self.families.values()
            for sample in family.samples
        }

    def value(self, name: str, instance: str | None = None, **labels: str) -> float | None:
        """The sample called *name*; None where there is none."""
        wanted = labels if instance is None else {"instance_id": instance, **labels}
        return self.samples.get((name, frozenset(wanted.items())))

    def of(self, instance: str) -> set[str]:
        """Names of the samples that *instance* has."""
        return {name for name, labels in self.samples if ("instance_id", instance) in labels}


def _full_name(family: Metric) -> str:
    return family.name + ("_total" if family.type == "counter" else "")


async def scrape(metrics: Metrics) -> Page:
    """A page in the text format, as Prometheus reads it."""
    text, _ = await metrics.page()
    return Page.plain(text)


def blocks() -> list[str]:
    """The YAML in the docs, from the first block on."""
    return re.findall(r"^```yaml\n(.*?)^```$", DOCS.read_text(), re.DOTALL | re.MULTILINE)


def rules() -> str:
    """The alert rules of the docs."""
    return next(block for block in blocks() if block.startswith("groups:"))


_ASKED = frozenset(re.findall(r"\w+", rules()))
"""Words in the rules, names of metrics among them: promtool takes long over what it does not need."""


def documented() -> dict[str, tuple[str, set[str]]]:
    """Type and labels of each metric in the docs' table, by name."""
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \|([^|]*)\| [^|]+ \|$", DOCS.read_text(), re.MULTILINE)
    return {name: (kind, set(re.findall(r"`(\w+)`", labels))) for name, kind, labels in rows}


def find_promtool() -> str | None:
    """Where promtool is; None where it is not installed, and need not be."""
    found = shutil.which("promtool")
    if found is None and os.environ.get("HYPEMAND_REQUIRE_PROMTOOL") == "1":
        pytest.fail("promtool not found; on Debian it is in the package prometheus")
    return found


def promtool(*arguments: str | Path, stdin: bytes = b"") -> str | None:
    """What promtool says against it; None where it agrees, or is not installed."""
    program = find_promtool()
    if program is None:
        return None
    done = subprocess.run(
        [program, *map(str, arguments)],
        input=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=60,
        check=False,
    )
    said = done.stdout.decode()
    print(said)  # noqa: T201 - whole, where a test fails
    return said if done.returncode or "error" in said.lower() else None


@define
class Recording:
    """What Prometheus would have stored: a page every so many minutes."""

    every: int = 1
    minutes: int = 0
    _values: dict[Series, list[str]] = field(factory=dict)

    def take(self, page: Page | None, **more: float) -> None:
        """Take in the next *page*, and *more* samples; None: hypemand was down.

        A series that is missing from it ends, as it does in Prometheus.
        """
        samples = {series: value for series, value in (page.samples if page else {}).items() if series[0] in _ASKED}
        for name, value in {"up": 0.0 if page is None else 1.0, **more}.items():
            samples[name, frozenset()] = float(value)
        for series in samples.keys() - self._values.keys():
            self._values[series] = ["_"] * (self.minutes // self.every)
        for series, values in self._values.items():
            new = samples.get(series)
            ends = bool(values) and values[-1] not in ("_", "stale")
            values.append(repr(new) if new is not None else "stale" if ends else "_")
        self.minutes += self.every

    def why_not(self, directory: Path, firing: Firing) -> str | None:
        """What promtool says if other alerts fire than *firing*; None: just those."""
        (directory / "rules.yml").write_text(rules())
        tests = {
            "rule_files": ["rules.yml"],
            "evaluation_interval": f"{self.every}m",
            "tests": [
                {
                    "interval": f"{self.every}m",
                    "input_series": [
                        {"series": _written(series), "values": " ".join(values)}
                        for series, values in self._values.items()
                    ],
                    "promql_expr_test": [
                        {"expr": _FIRING, "eval_time": f"{minute}m", "exp_samples": [*map(_fires, alerts)]}
                        for minute, alerts in firing.items()
                    ],
                }
            ],
        }
        (directory / "tests.yml").write_text(json.dumps(tests))
        return promtool("test", "rules", directory / "tests.yml")


def _written(series: Series) -> str:
    name, labels = series
    all_labels = {**dict(labels), "job": "hypemand", "instance": "host-1:8443"}
    return name + "{" + ",".join(f"{key}={json.dumps(value)}" for key, value in sorted(all_labels.items())) + "}"


def _fires(alert: tuple[str, str | None]) -> dict[str, object]:
    name, instance = alert
    of_instance = "" if instance is None else f', instance_id="{instance}"'
    return {"labels": f'{{alertname="{name}"{of_instance}}}', "value": 1}
