"""The config: every mistake is named with its path and its rule, all of them at once."""

import os
from datetime import timedelta
from pathlib import Path

import platformdirs
import pytest

from hypemand.backends import registry
from hypemand.config import Config, LogFormat, LogLevel, config_warnings, parse_config
from hypemand.config_files import default_state_dir, find_config, guess_config, load_config
from hypemand.core.errors import InvalidInput, Problem
from hypemand.core.model import InstanceId

SAMPLES = Path(__file__).parent / "configs"
VALID = sorted((SAMPLES / "valid").glob("*.toml"))
INVALID = sorted((SAMPLES / "invalid").glob("*.toml"))
BASE = Path("/etc/hypemand")
STATE = Path("/var/lib/hypemand")
LAB = '[backends.lab]\ntype = "embedded"\nroot = "lab"\n'


def parse(text: str | bytes, base: Path = BASE) -> Config:
    data = text if isinstance(text, bytes) else text.encode()
    return parse_config(data, base, STATE, registry.parse_settings)


def problems(text: str | bytes) -> list[Problem]:
    with pytest.raises(InvalidInput) as caught:
        parse(text)
    return list(caught.value.problems)


def with_schedule(line: str, instance: str = '"web-1"', interval: str = '"1h"') -> str:
    return f"{LAB}[[schedules]]\ninstance = {instance}\ninterval = {interval}\n{line}\n"


def with_interval(interval: str) -> str:
    return with_schedule("", interval=interval)


def with_instance(instance: str) -> str:
    return with_schedule("", instance=instance)


TAGS_51 = ", ".join(f't{number} = "x"' for number in range(51))
INTERVAL, RETENTION = "schedules[0].interval", "schedules[0].retention"
PREFIX, METADATA, INSTANCE = "schedules[0].name_prefix", "schedules[0].metadata", "schedules[0].instance"

BAD: dict[str, tuple[str | bytes, str, str]] = {
    "interval 59s": (with_interval('"59s"'), INTERVAL, "at least 1m"),
    "interval negative": (with_interval('"-1h"'), INTERVAL, "at least 1m"),
    "interval in days": (with_interval('"1d"'), INTERVAL, "no days"),
    "interval empty": (with_interval('""'), INTERVAL, "not a duration"),
    "interval without a unit": (with_interval('"90"'), INTERVAL, "without a unit"),
    "interval a number": (with_interval("90"), INTERVAL, "must be a string"),
    "interval a time": (with_interval("02:00:00"), INTERVAL, "must be a string"),
    "max_count negative": (with_schedule("retention = { max_count = -1 }"), f"{RETENTION}.max_count", "0 or more"),
    "max_count 1.5": (with_schedule("retention = { max_count = 1.5 }"), f"{RETENTION}.max_count", "whole number"),
    "max_count true": (with_schedule("retention = { max_count = true }"), f"{RETENTION}.max_count", "whole number"),
    "max_count of 64 bits": (with_schedule(f"retention.max_count = {2**63}"), f"{RETENTION}.max_count", "at most"),
    "max_age negative": (with_schedule('retention = { max_age = "-1h" }'), f"{RETENTION}.max_age", "not be negative"),
    "retention a text": (with_schedule('retention = "7"'), RETENTION, "table"),
    "prefix of 48": (with_schedule(f'name_prefix = "{"p" * 48}"'), PREFIX, "47 at most"),
    "prefix with a capital": (with_schedule('name_prefix = "Nightly"'), PREFIX, "lower-case"),
    "prefix with a dash at its end": (with_schedule('name_prefix = "nightly-"'), PREFIX, "no dash at either end"),
    "51 tags": (with_schedule(f"metadata = {{ {TAGS_51} }}"), METADATA, "50 at most"),
    "tag key of 129": (with_schedule(f'metadata = {{ {"k" * 129} = "x" }}'), METADATA, "1 to 128"),
    "tag value of 257": (with_schedule(f'metadata = {{ k = "{"v" * 257}" }}'), f"{METADATA}.k", "0 to 256"),
    "unknown key at the top": ("sate_dir = 'x'", "sate_dir", "did you mean 'state_dir'"),
    "unknown key in log": ("[log]\nlevle = 'info'", "log.levle", "did you mean 'level'"),
    "unknown key in api": ("[api]\nport = 1", "api.port", "unknown key"),
    "unknown key in runs": ("[runs]\nconcurency = 1", "runs.concurency", "did you mean 'concurrency'"),
    "unknown key in hooks": ("[hooks]\non_failed = []", "hooks.on_failed", "did you mean 'on_failure'"),
    "unknown key in a backend": (LAB + "rot = 'x'", "backends.lab.rot", "did you mean 'root'"),
    "unknown key in a schedule": (with_schedule("intervall = 1"), "schedules[0].intervall", "did you mean 'interval'"),
    "unknown key in retention": (with_schedule("retention = { max = 1 }"), f"{RETENTION}.max", "unknown key"),
    "two schedules for one instance": (
        with_schedule("") + '[[schedules]]\ninstance = "web-1"\ninterval = "2h"',
        "schedules[1].instance",
        "has a schedule already",
    ),
    "a backend that is not there": (with_schedule('backend = "labb"'), "schedules[0].backend", "known: lab"),
    "several backends and none named": (
        '[backends.other]\ntype = "embedded"\nroot = "o"\n' + with_schedule(""),
        "schedules[0].backend",
        "several backends: other, lab",
    ),
    "no backend at all": ('[[schedules]]\ninstance = "a"\ninterval = "1h"', "schedules[0].backend", "no backend"),
    "instance a path": (with_instance('"../x"'), INSTANCE, "1 to 128 of"),
    "instance hidden": (with_instance('".hidden"'), INSTANCE, "without a leading dot"),
    "instance of 129": (with_instance(f'"{"i" * 129}"'), INSTANCE, "1 to 128 of"),
    "instance empty": (with_instance('""'), INSTANCE, "1 to 128 of"),
    "instance a number": (with_instance("7"), INSTANCE, "must be a string"),
    "pattern with a path": (with_instance('"../*"'), INSTANCE, "must be a pattern"),
    "pattern hidden": (with_instance('".*"'), INSTANCE, "without a leading dot"),
    "first_run 25:00": (with_schedule('first_run = "25:00"'), "schedules[0].first_run", 'must be "now" or'),
    "max_freeze zero": (with_schedule('max_freeze = "0s"'), "schedules[0].max_freeze", "more than zero"),
    "enabled a text": (with_schedule('enabled = "false"'), "schedules[0].enabled", "true or false"),
    "listen without a port": ('[api]\nlisten = "127.0.0.1"\ntokens_file = "t"', "api.listen", "an address and a port"),
    "listen on port 0": ('[api]\nlisten = "[::1]:0"\ntokens_file = "t"', "api.listen", "an address and a port"),
    "listen a number": ("[api]\nlisten = 8080", "api.listen", "must be a string"),
    "listen beyond loopback without a certificate": (
        '[api]\nlisten = "0.0.0.0:8080"\ntokens_file = "t"\ntls_key = "k"',
        "api.tls_cert",
        "needs TLS",
    ),
    "listen beyond loopback without a key": (
        '[api]\nlisten = "host.example:8080"\ntokens_file = "t"\ntls_cert = "c"',
        "api.tls_key",
        "needs TLS",
    ),
    "unknown backend type": ('[backends.lab]\ntype = "vmware"', "backends.lab.type", "known here: "),
    "backend without a type": ("[backends.lab]\nroot = 'x'", "backends.lab.type", "is missing"),
    "backend without its own key": ('[backends.lab]\ntype = "embedded"', "backends.lab.root", "is missing"),
    "backend with a bad name": (f"[backends.'a/b']{LAB.partition(']')[2]}", "backends.a/b", "a backend's name"),
    "backend a text": ('backends.lab = "embedded"', "backends.lab", "table"),
    "backend concurrency zero": (LAB + "concurrency = 0", "backends.lab.concurrency", "1 or more"),
    "qemu socket without a placeholder": (
        '[backends.vms]\ntype = "qemu"\nsocket = "/run/vm.sock"',
        "backends.vms.socket",
        "{instance}",
    ),
    "log level": ("[log]\nlevel = 'loud'", "log.level", "debug, info, warning, error"),
    "runs concurrency": ("[runs]\nconcurrency = 0", "runs.concurrency", "1 or more"),
    "min_free": ("[runs]\nmin_free = '1 gig'", "runs.min_free", "is not a size"),
    "hook on the PATH": ("[hooks]\non_failure = ['page-me', 'me']", "hooks.on_failure[0]", "absolute path"),
    "hook empty": ("[hooks]\non_success = ['']", "hooks.on_success[0]", "absolute path"),
    "hook with a NUL": ('[hooks]\non_success = ["/bin/true", "\\u0000"]', "hooks.on_success", "NUL"),
    "hook a number": ("[hooks]\non_success = [7]", "hooks.on_success[0]", "must be a string"),
    "hooks in no time": ("[hooks]\ntimeout = '0s'", "hooks.timeout", "more than zero"),
    "hooks a text": ("[hooks]\non_failure = 'page me'", "hooks.on_failure", "list"),
    "state_dir empty": ("state_dir = ''", "state_dir", "must be a path"),
    "state_dir of nobody": ("state_dir = '~no-such-user-here/x'", "state_dir", "no such home directory"),
    "schedules a table": ("[schedules]\ninstance = 'a'", "schedules", "list"),
    "a schedule that is a number": ("schedules = [7]", "schedules[0]", "table"),
    "not TOML": ("state_dir = ", "", "is not TOML"),
    "the same key twice": ("a = 1\na = 2", "", "is not TOML"),
    "empty": ("", "", "is empty"),
    "only comments": ("# nothing\n\n# here", "", "is empty"),
    "not UTF-8": (b"state_dir = '\xff'", "", "is not TOML"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_mistake_is_told_with_its_path_and_its_rule(case: str) -> None:
    text, path, rule = BAD[case]
    found = problems(text)
    assert [problem for problem in found if problem.path == path and rule in problem.message], found
    assert len(found) <= 2, found  # no others come along


def test_fourteen_mistakes_in_one_config_are_all_told() -> None:
    text = """
        top = 1
        [log]
        level = "loud"
        [api]
        listen = "0.0.0.0:80"
        socket = ""
        [runs]
        concurrency = 0
        [backends.lab]
        type = "embedded"
        [backends.vms]
        type = "qemu"
        socket = "here"
        [[schedules]]
        instance = "../x"
        interval = "1s"
        retention = { max_count = -1, max = 1 }
        first_run = "25:00"
    """
    assert {problem.path for problem in problems(text)} == {
        "top",
        "log.level",
        "api.socket",
        "api.tls_cert",
        "api.tls_key",
        "runs.concurrency",
        "backends.lab.root",
        "backends.vms.socket",
        "schedules[0].instance",
        "schedules[0].interval",
        "schedules[0].retention.max_count",
        "schedules[0].retention.max",
        "schedules[0].first_run",
        "schedules[0].backend",
    }


def test_no_mistake_is_told_twice() -> None:
    for text, _, _ in BAD.values():
        found = problems(text)
        assert len(found) == len(set(found))


@pytest.mark.parametrize("sample", INVALID, ids=lambda path: path.stem)
def test_each_invalid_sample_is_refused_where_it_says(sample: Path) -> None:
    data = sample.read_bytes()
    expect = data.splitlines()[0].decode()
    assert expect.startswith("# expect:")
    assert expect.removeprefix("# expect:").strip() in {problem.path for problem in problems(data)}


@pytest.mark.parametrize("sample", VALID, ids=lambda path: path.stem)
def test_each_valid_sample_is_taken_and_every_path_is_absolute(sample: Path) -> None:
    config = parse(sample.read_bytes())
    paths = [config.state_dir, config.api.socket, config.api.tokens_file, config.api.tls_cert, config.api.tls_key]
    for backend in config.backends.values():
        paths += [value for value in vars_of(backend.settings) if isinstance(value, Path)]
    assert all(path is None or path.is_absolute() for path in paths)


def vars_of(settings: object) -> list[object]:
    return [getattr(settings, name) for name in getattr(settings, "__match_args__", ())]


def test_the_samples_are_there() -> None:
    assert len(VALID) >= 5
    assert len(INVALID) >= 15


def test_the_example_of_the_design_means_what_it_says() -> None:
    config = parse((SAMPLES / "valid" / "design.toml").read_bytes())
    assert config.state_dir == Path("/var/lib/hypemand")
    assert (config.log.level, config.log.format) == (LogLevel.INFO, LogFormat.AUTO)
    assert config.api.socket == Path("/run/hypemand/api.sock")
    assert config.api.listen == "127.0.0.1:8080"
    assert config.api.tokens_file == Path("/etc/hypemand/tokens")
    assert config.runs.concurrency == 4
    assert config.runs.max_freeze == timedelta(minutes=2)
    assert config.runs.capture_timeout == timedelta(hours=1)
    assert config.runs.shutdown_grace == timedelta(seconds=30)
    assert config.runs.min_free == 2**30
    assert config.runs.guard is True
    assert config.hooks.on_failure == ("/usr/local/bin/page-me",)
    assert config.hooks.timeout == timedelta(minutes=1)
    assert config.backends["lab"].type == "embedded"
    assert config.backends["lab"].concurrency == 2
    assert config.backends["lab"].settings.root == Path("/var/lib/hypemand/embedded")
    assert config.backends["lab"].settings.instances["web-1"].memory == 16 * 2**20
    [entry] = config.schedules
    assert config.backend_of(entry) == "lab"
    assert entry.interval == timedelta(hours=24)
    assert (entry.kept().max_age, entry.kept().max_count) == (timedelta(hours=168), 7)
    assert entry.name_prefix == "nightly"
    assert entry.metadata == {"team": "backend", "env": "staging"}
    assert entry.first_run == "now"
    assert entry.max_freeze == timedelta(seconds=30)
    assert entry.enabled
    assert config_warnings(config) == []


def test_what_is_left_out_has_the_defaults_of_the_design() -> None:
    documented = parse((SAMPLES / "valid" / "design.toml").read_bytes())
    bare = parse("[log]")
    assert bare.runs == documented.runs
    assert bare.log == documented.log
    assert bare.state_dir == STATE
    assert bare.api.listen is None


def test_the_example_that_is_shipped_is_valid() -> None:
    config = parse((Path(__file__).parent.parent / "config.example.toml").read_bytes())
    assert [entry.instance for entry in config.schedules] == ["web-1"]


def test_relative_paths_are_taken_from_the_directory_of_the_config_and_tilde_is_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir("/")
    folder = tmp_path / "conf"
    folder.mkdir()
    (folder / "config.toml").write_text(
        'state_dir = "state"\n[api]\nsocket = "~/api.sock"\ntokens_file = "../tokens"\n'
        '[backends.lab]\ntype = "embedded"\nroot = "~/lab"\n'
        '[backends.vms]\ntype = "qemu"\nsocket = "{instance}.sock"\n'
    )
    monkeypatch.chdir(tmp_path)
    config = load_config(Path("conf/config.toml"), registry.parse_settings)
    assert config.state_dir == folder / "state"
    assert config.api.socket == tmp_path / "home" / "api.sock"
    assert config.api.tokens_file == folder / "../tokens"
    assert config.backends["lab"].settings.root == tmp_path / "home" / "lab"
    assert config.backends["vms"].settings.socket == folder / "{instance}.sock"


def test_a_config_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load_config(tmp_path / "config.toml", registry.parse_settings)
    with pytest.raises(IsADirectoryError):
        load_config(tmp_path, registry.parse_settings)


def test_a_pattern_takes_in_what_matches_and_an_id_itself_alone() -> None:
    entries = parse((SAMPLES / "valid" / "pattern.toml").read_bytes()).schedules
    matching = [
        [entry.matches(InstanceId(name)) for entry in entries] for name in ("web-1", "web-22", "xweb-1", "Web-1")
    ]
    assert matching == [[True, True], [True, False], [False, False], [False, False]]


def test_what_is_allowed_but_odd_is_warned_about() -> None:
    kept_for_ever = parse(with_schedule("retention = { max_count = 0 }") + '[[schedules]]\ninstance="b"\ninterval="1h"')
    assert [warning.partition(":")[0] for warning in config_warnings(kept_for_ever)] == [
        "schedules[0].retention",
        "schedules[1].retention",
    ]
    assert "'web-1'" in config_warnings(kept_for_ever)[0]
    assert config_warnings(parse(LAB)) == ["schedules: there are none"]
    assert config_warnings(parse(with_schedule('retention = { max_age = "1h" }'))) == []


def test_the_config_is_found_where_it_is_named_then_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYPEMAND_CONFIG", "/from/env.toml")
    assert find_config("named.toml") == Path("named.toml")
    assert find_config(None) == Path("/from/env.toml")
    assert find_config("") == Path("/from/env.toml")
    monkeypatch.setenv("HYPEMAND_CONFIG", "")
    assert find_config(None) != Path()


def test_without_a_name_the_config_is_the_systems_or_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HYPEMAND_CONFIG", raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    system = Path("/etc/hypemand/config.toml")
    assert find_config(None) == (system if system.exists() else tmp_path / "hypemand" / "config.toml")


@pytest.mark.parametrize("given", ["/from/systemd", "/from/systemd:/second"])
def test_the_state_directory_is_the_first_that_systemd_gives(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STATE_DIRECTORY", given)
    assert default_state_dir() == Path("/from/systemd")


@pytest.mark.parametrize("given", [None, ""])
def test_without_systemd_the_state_directory_is_by_user(given: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("STATE_DIRECTORY", raising=False)
    if given is not None:
        monkeypatch.setenv("STATE_DIRECTORY", given)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert default_state_dir() == Path("/var/lib/hypemand")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert default_state_dir() == platformdirs.user_state_path("hypemand")
    assert default_state_dir().is_absolute()


def test_the_configs_state_directory_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STATE_DIRECTORY", "/from/systemd")
    path = tmp_path / "config.toml"
    path.write_text('state_dir = "/own"\n')
    assert load_config(path, registry.parse_settings).state_dir == Path("/own")
    path.write_text("[log]\n")
    assert load_config(path, registry.parse_settings).state_dir == Path("/from/systemd")


GUESSES = {
    "valid": (b'state_dir = "here"\n', "/etc/hypemand/here"),
    "invalid value elsewhere": (b'state_dir = "here"\n[log]\nlevel = 7\n', "/etc/hypemand/here"),
    "broken after it": (b'state_dir = "here"\n[log\nlevel', "/etc/hypemand/here"),
    "broken far after it": (b'state_dir = "/x"\n[log]\nlevel = "info"\n[runs]\n]]]\n', "/x"),
    "not UTF-8 after it": (b'state_dir = "/x"\n[log]\nlevel = "\xff"\n"', "/x"),
    "torn in the middle of a text": (b'state_dir = "/x"\n[backends.lab]\nroot = "/var', "/x"),
    "of nobody": (b'state_dir = "~no-such-user-here/x"\n', "/default"),
    "with a NUL": (b'state_dir = "a\\u0000b"\n', "/default"),
    "empty text": (b'state_dir = ""\n', "/default"),
    "a number": (b"state_dir = 7\n", "/default"),
    "left out": (b"[log]\n", "/default"),
    "broken before it": (b'[[[\nstate_dir = "/x"\n', "/default"),
    "torn itself": (b'state_dir = "/va', "/default"),
    "empty": (b"", "/default"),
    "no text at all": (bytes(range(256)), "/default"),
}


@pytest.mark.parametrize("case", GUESSES)
def test_the_state_directory_of_a_broken_config_is_guessed(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STATE_DIRECTORY", "/default")
    data, guess = GUESSES[case]
    assert guess_config(data, BASE).state_dir == Path(guess)


def test_the_guess_expands_the_home_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert guess_config(b'state_dir = "~/state"\n[', BASE).state_dir == Path("/home/me/state")


def test_the_socket_of_a_config_with_problems_is_guessed_too() -> None:
    told = b'state_dir = "state"\n[api]\nsocket = "run/s"\nlisten = 3\n[nonsense'
    assert guess_config(told, BASE).api.socket == BASE / "run/s"
    for nothing in (b"[api]\nsocket = 3", b'api = "x"', b"["):
        assert guess_config(nothing, BASE).api.socket is None
