"""Tokens and TLS files: what is taken, what is refused, and that no token is ever shown."""

import errno
import hmac
import os
import ssl
from pathlib import Path

import pytest
from attrs import evolve
from structlog.typing import EventDict

from hypemand.config import ApiConfig
from hypemand.core.errors import InvalidInput
from hypemand.surface.http.access import CurrentAccess, read_access
from hypemand.surface.http.tokens import Tokens, parse_tokens, read_tokens

TLS = Path(__file__).parent / "tls"
ONE = "first-token-of-16"
TWO = "another:token/with=signs+16"
GOOD = f"""\
# who may come in

backup: {ONE}
  deploy-2.x:{TWO}  \r
"""


@pytest.fixture(autouse=True)
def no_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CREDENTIALS_DIRECTORY", raising=False)


def problems(text: str) -> list[str]:
    with pytest.raises(InvalidInput) as caught:
        parse_tokens(text)
    return [str(problem) for problem in caught.value.problems]


def token_file(folder: Path, text: str = GOOD, mode: int = 0o600) -> Path:
    path = folder / "tokens"
    path.write_text(text)
    path.chmod(mode)
    return path


def test_a_line_is_a_name_a_colon_and_a_token_which_may_have_colons_itself() -> None:
    assert parse_tokens(GOOD) == {"backup": ONE, "deploy-2.x": TWO}


BAD = {
    "no colon": ("SECRET-SECRET-SECRET", 'line 1: must be "name:token"'),
    "no name": (":SECRET-SECRET-SECRET", "line 1: the client's name"),
    "name with a space": ("my laptop:SECRET-SECRET-SECRET", "line 1: the client's name"),
    "name too long": (f"{'n' * 65}:SECRET-SECRET-SECRET", "line 1: the client's name"),
    "name hidden": (".n:SECRET-SECRET-SECRET", "line 1: the client's name"),
    "swapped": ("SECRET/SECRET/SECRET:me", "line 1: the client's name"),
    "the socket's": ("socket:SECRET-SECRET-SECRET", 'line 1: "socket" is what clients on the control socket'),
    "no token": ("me:", "line 1: the token"),
    "7 characters": ("me:SECRET7", "8 characters or more"),
    "with a tab": ("me:SECRET\tSECRET SECRET", "visible ASCII"),
    "not ASCII": ("me:SECRETSECRETSECRÉT", "visible ASCII"),
    "client twice": ("me:SECRET-SECRET-SECRET\n#\nme:SECRET-SECRET-OTHER", "line 3: this client is in line 1 already"),
    "token twice": ("me:SECRET-SECRET-SECRET\nyou:SECRET-SECRET-SECRET", "line 2: this token is in line 1 already"),
    "nothing": ("", "has no token"),
    "comments alone": ("# me:SECRET-SECRET-SECRET\n \n", "has no token"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_wrong_line_is_told_by_number_and_never_shown(case: str, tmp_path: Path) -> None:
    text, rule = BAD[case]
    (problem,) = problems(text)
    assert rule in problem
    with pytest.raises(InvalidInput) as caught:
        read_tokens(token_file(tmp_path, text))
    assert rule.removeprefix("line 1: ") in str(caught.value)
    assert str(tmp_path / "tokens") in str(caught.value)
    assert "SECR" not in str(caught.value)
    assert "SECR" not in problem


def test_every_wrong_line_is_told() -> None:
    assert [problem.partition(":")[0] for problem in problems("a\nme:short\nok:SECRET-SECRET-SECRET\n:x")] == [
        "line 1",
        "line 2",
        "line 4",
    ]


# Who is who.


@pytest.mark.parametrize(
    ("header", "client"),
    [
        (f"Bearer {ONE}", "backup"),
        (f"bearer {ONE}", "backup"),
        (f"BEARER   {TWO} ", "deploy-2.x"),
        (None, None),
        ("", None),
        ("Bearer", None),
        ("Bearer ", None),
        (ONE, None),
        (f"Basic {ONE}", None),
        (f"Bearer {ONE[:-1]}", None),
        (f"Bearer {ONE}x", None),
        (f"Bearer {ONE.upper()}", None),
        (f"Bearer backup:{ONE}", None),
        (f"Bearer {ONE}, Bearer {TWO}", None),
        ("Bearer \xff\ud800\x00", None),
    ],
)
def test_a_client_is_known_by_its_whole_token_alone(header: str | None, client: str | None) -> None:
    assert Tokens(parse_tokens(GOOD)).client_of(header) == client


def test_every_token_is_compared_in_constant_time_also_after_the_right_one(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[int, int]] = []
    really = hmac.compare_digest

    def compare(one: bytes, other: bytes) -> bool:
        compared.append((len(one), len(other)))
        return really(one, other)

    known = Tokens({"a": ONE, "b": TWO, "c": "third-token-of-16"})
    monkeypatch.setattr(hmac, "compare_digest", compare)
    for shown in (ONE, "third-token-of-16", "x", "y" * 5000):
        known.client_of(f"Bearer {shown}")
    # Of digests, so that not even a length can be told.
    assert compared == [(32, 32)] * 12


def test_tokens_do_not_show_themselves() -> None:
    known = Tokens({"me": ONE})
    shown = f"{known!r} {vars(known)!r} {CurrentAccess(None)!r}"
    assert ONE not in shown
    assert known.clients == ("me",)


# The file.


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o602, 0o610, 0o666, 0o644])
def test_a_file_that_others_can_read_or_write_is_refused(mode: int, tmp_path: Path) -> None:
    path = token_file(tmp_path, mode=mode)
    with pytest.raises(InvalidInput, match=f"mode {mode:04o}.*chmod 600"):
        read_tokens(path)
    path.chmod(0o600)
    assert read_tokens(path).clients == ("backup", "deploy-2.x")


def test_what_is_no_file_of_tokens_is_refused_and_holds_nothing_up(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe", 0o600)
    (tmp_path / "folder").mkdir(mode=0o700)
    (tmp_path / "binary").write_bytes(b"me:\xff\xfe")
    (tmp_path / "large").write_bytes(b"#" * 1024**2 + b"#")
    for path in tmp_path.iterdir():
        path.chmod(0o700 if path.is_dir() else 0o600)
    told = {}
    for name in ("pipe", "folder", "binary", "large", "missing"):
        with pytest.raises(InvalidInput) as caught:
            read_tokens(tmp_path / name)
        told[name] = str(caught.value).partition(str(tmp_path / name))[2].strip()
    assert told == {
        "pipe": "can't be read: it is no file",
        "folder": "can't be read: it is no file",
        "binary": "is no text",
        "large": "can't be read: it is larger than 1 MiB",
        "missing": "can't be read: No such file or directory",
    }


def test_a_byte_order_mark_is_no_part_of_a_name(tmp_path: Path) -> None:
    path = token_file(tmp_path)
    path.write_bytes(b"\xef\xbb\xbf" + GOOD.encode())
    assert read_tokens(path).clients == ("backup", "deploy-2.x")


# systemd's credential.


def test_the_credential_is_taken_where_the_config_names_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    credentials, own = tmp_path / "credentials", tmp_path / "own"
    credentials.mkdir()
    own.mkdir()
    token_file(credentials, f"by-systemd:{ONE}")
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(credentials))
    assert read_access(ApiConfig()).tokens.clients == ("by-systemd",)
    named = ApiConfig(tokens_file=token_file(own, f"by-config:{ONE}"))
    assert read_access(named).tokens.clients == ("by-config",)


def test_a_credential_may_show_the_mask_of_its_access_list_as_group_and_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    path = token_file(tmp_path, mode=0o440)
    assert read_tokens(path).clients == ("backup", "deploy-2.x")
    for mode in (0o444, 0o460, 0o450):
        path.chmod(mode)
        with pytest.raises(InvalidInput, match="others can read it"):
            read_tokens(path)
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path / "elsewhere"))
    path.chmod(0o440)
    with pytest.raises(InvalidInput, match="others can read it"):
        read_tokens(path)


@pytest.mark.parametrize("given", [None, "", "/no/such/directory"])
def test_without_tokens_nobody_can_be_let_in(given: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if given is not None:
        monkeypatch.setenv("CREDENTIALS_DIRECTORY", given)
    with pytest.raises(InvalidInput) as caught:
        read_access(ApiConfig(listen="127.0.0.1:8080"))
    (problem,) = caught.value.problems
    assert problem.path == "api.tokens_file"
    assert 'needs a file of tokens, or the systemd credential "tokens"' in problem.message


# TLS files.


def tls_problem(folder: Path, cert: Path | None, key: Path | None) -> str:
    with pytest.raises(InvalidInput) as caught:
        read_access(ApiConfig(tokens_file=token_file(folder), tls_cert=cert, tls_key=key))
    (problem,) = caught.value.problems
    return str(problem)


def test_each_wrong_tls_file_is_told_by_its_key_in_the_config(tmp_path: Path) -> None:
    cert, key, missing, empty = TLS / "cert.pem", TLS / "key.pem", tmp_path / "missing", tmp_path / "empty"
    empty.touch()
    told = [
        tls_problem(tmp_path, cert, None),
        tls_problem(tmp_path, None, key),
        tls_problem(tmp_path, missing, key),
        tls_problem(tmp_path, cert, missing),
        tls_problem(tmp_path, cert, tmp_path),
        tls_problem(tmp_path, empty, key),
        tls_problem(tmp_path, key, key),
        tls_problem(tmp_path, cert, empty),
        tls_problem(tmp_path, cert, cert),
        tls_problem(tmp_path, cert, TLS / "other-key.pem"),
        tls_problem(tmp_path, cert, TLS / "encrypted-key.pem"),
    ]
    expected = [
        ("api.tls_key", "is missing; it goes with api.tls_cert"),
        ("api.tls_cert", "is missing; it goes with api.tls_key"),
        ("api.tls_cert", "No such file or directory"),
        ("api.tls_key", "No such file or directory"),
        ("api.tls_key", "Is a directory"),
        ("api.tls_cert", "no certificate in PEM form"),
        ("api.tls_cert", "no certificate in PEM form"),
        ("api.tls_key", "no private key in PEM form"),
        ("api.tls_key", "no private key in PEM form"),
        ("api.tls_key", "does not belong to the certificate"),
        ("api.tls_key", "is encrypted: write it without a passphrase"),
    ]
    for problem, (path, rule) in zip(told, expected, strict=True):
        assert problem.startswith(f"{path}: ")
        assert rule in problem


def test_tokens_and_tls_are_told_together(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput) as caught:
        read_access(ApiConfig(tokens_file=tmp_path / "none", tls_cert=tmp_path / "none", tls_key=tmp_path / "none"))
    assert [problem.path for problem in caught.value.problems] == ["api.tokens_file", "api.tls_cert", "api.tls_key"]


# Read again.


async def test_a_broken_file_keeps_the_tokens_before_in_force_and_a_good_one_replaces_them(
    tmp_path: Path, heard_log: list[EventDict]
) -> None:
    api = ApiConfig(listen="127.0.0.1:8080", tokens_file=token_file(tmp_path, f"me:{ONE}"))
    current = CurrentAccess(read_access(api))
    token_file(tmp_path, f"me:{TWO}\nbroken")
    await current.reread(api)
    assert (current.client_of(f"Bearer {ONE}"), current.client_of(f"Bearer {TWO}")) == ("me", None)
    token_file(tmp_path, f"me:{TWO}")
    await current.reread(api)
    assert (current.client_of(f"Bearer {ONE}"), current.client_of(f"Bearer {TWO}")) == (None, "me")
    assert [line["log_level"] for line in heard_log] == ["error", "info"]
    assert "line 2" in heard_log[0]["error"]
    assert heard_log[1]["clients"] == ["me"]
    assert ONE not in str(heard_log)
    assert TWO not in str(heard_log)


async def test_nobody_is_let_in_where_tcp_is_not_served(tmp_path: Path, heard_log: list[EventDict]) -> None:
    current = CurrentAccess(None)
    await current.reread(ApiConfig(listen="127.0.0.1:8080", tokens_file=tmp_path / "missing"))
    assert current.client_of(f"Bearer {ONE}") is None
    assert current.tls() is None
    assert [(line["log_level"], "would not start" in line["event"]) for line in heard_log] == [("error", True)]


async def test_a_renewed_certificate_is_taken_up_and_a_broken_one_is_not(tmp_path: Path) -> None:
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    cert.write_bytes((TLS / "cert.pem").read_bytes())
    key.write_bytes((TLS / "key.pem").read_bytes())
    api = ApiConfig(listen="127.0.0.1:8080", tokens_file=token_file(tmp_path), tls_cert=cert, tls_key=key)
    current = CurrentAccess(read_access(api))
    first = current.tls()
    key.write_bytes((TLS / "other-key.pem").read_bytes())
    await current.reread(api)
    assert current.tls() is first is not None
    key.write_bytes((TLS / "key.pem").read_bytes())
    await current.reread(api)
    assert current.tls() is not first
    assert current.tls() is not None


async def test_what_is_encrypted_stays_so_until_a_restart(tmp_path: Path, heard_log: list[EventDict]) -> None:
    plain = ApiConfig(listen="127.0.0.1:8080", tokens_file=token_file(tmp_path, f"me:{ONE}"))
    with_tls = evolve(plain, listen="0.0.0.0:8443", tls_cert=TLS / "cert.pem", tls_key=TLS / "key.pem")
    current = CurrentAccess(read_access(with_tls))
    first = current.tls()
    token_file(tmp_path, f"me:{TWO}")
    await current.reread(plain)
    assert current.tls() is first is not None
    assert current.client_of(f"Bearer {TWO}") == "me"
    assert [line["event"] for line in heard_log if line["log_level"] == "warning"] == [
        "TCP without TLS takes a restart; until then it is encrypted as before"
    ]


async def test_a_certificate_that_is_taken_away_while_it_is_read_leaves_the_one_before_in_force(
    tmp_path: Path, heard_log: list[EventDict], monkeypatch: pytest.MonkeyPatch
) -> None:
    listen = ApiConfig(listen="127.0.0.1:8080", tokens_file=token_file(tmp_path))
    api = evolve(listen, tls_cert=TLS / "cert.pem", tls_key=TLS / "key.pem")
    current = CurrentAccess(read_access(api))
    first = current.tls()

    def load(*_: object, **__: object) -> None:
        raise FileNotFoundError(errno.ENOENT, "no such file or directory")

    monkeypatch.setattr(ssl.SSLContext, "load_cert_chain", load)
    await current.reread(api)
    assert current.tls() is first is not None
    assert [line["log_level"] for line in heard_log] == ["error"]
