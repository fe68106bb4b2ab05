"""The API of a real daemon in a process of its own: who is let in, and that clients never stand in a run's way."""

import json
import signal
import socket
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
import trio

from tests.processes import ALONE, PATIENCE_S, RUN_NOW, SLOW, Lab, run_cli, running_daemon, wait_until
from tests.talking import ask, connect, free_port, head

TLS = Path(__file__).parent / "tls"
HOURLY = RUN_NOW.replace('first_run = "now"\n', "")
SCHEDULE = "/instances/web-1/snapshot-schedule"
FIRST, SECOND = "first-token-of-the-lab", "second-token-of-the-lab"
GENEROUS_S = 10.0


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    return Lab(tmp_path)


def api_table(port: int, *lines: str) -> str:
    return "\n".join(["[api]", f'listen = "127.0.0.1:{port}"', 'tokens_file = "tokens"', *lines, ""])


def write_tokens(lab: Lab, *tokens: str, mode: int = 0o600) -> None:
    path = lab.directory / "tokens"
    path.write_text("".join(f"client-{number}:{token}\n" for number, token in enumerate(tokens)))
    path.chmod(mode)


def bearer(token: str) -> str:
    return f"Authorization: Bearer {token}"


def socket_of(lab: Lab) -> Path:
    return lab.state / "api.sock"


async def test_tokens_decide_over_tcp_are_read_again_and_never_logged(lab: Lab) -> None:
    port = free_port()
    write_tokens(lab, FIRST)
    lab.write(api_table(port) + '[log]\nlevel = "debug"\n' + HOURLY)
    async with running_daemon(lab.config) as daemon:
        await daemon.wait_for("API serves", listen=f"127.0.0.1:{port}")

        async def status(*lines: str) -> int:
            given = await ask(port, SCHEDULE, *lines)
            if given.status == 401:
                assert given.json["code"] == "unauthorized"
            return given.status

        assert [await status(), await status(bearer("wrong-token-of-the-lab")), await status(bearer(FIRST))] == [
            401,
            401,
            200,
        ]
        assert (await ask(socket_of(lab), SCHEDULE)).status == 200  # whoever may open it is trusted
        async with await connect(port) as kept:
            # A token that is taken away opens nothing any more, on a connection that is there already either.
            await kept.send_all(head("GET", SCHEDULE, bearer(FIRST)))
            write_tokens(lab, SECOND)
            daemon.send(signal.SIGHUP)
            await daemon.wait_for("tokens in force", clients=["client-0"])
            assert (await status(bearer(FIRST)), await status(bearer(SECOND))) == (401, 200)
        write_tokens(lab, FIRST, mode=0o644)
        daemon.send(signal.SIGHUP)
        refused = await daemon.wait_for("invalid tokens or TLS; the ones before stay in force")
        assert "others can read it (mode 0644)" in refused["error"]
        told = await run_cli("status", "--check", "-c", lab.config)
        assert (told.status, "others can read it (mode 0644)" in told.stdout) == (1, True)
        assert "the ones before stay in force" in (await run_cli("status", "-c", lab.config)).stderr
        assert (await status(bearer(FIRST)), await status(bearer(SECOND))) == (401, 200)

        # Taken away while the config is broken: it must not stay in force for that.
        lab.replace(lab.config.read_text() + "\nno TOML")
        write_tokens(lab, FIRST)
        mark = daemon.mark()
        daemon.send(signal.SIGHUP)
        await daemon.wait_for("tokens in force", since=mark)
        assert (await status(bearer(FIRST)), await status(bearer(SECOND))) == (200, 401)
        assert "stay in force" not in (await run_cli("status", "-c", lab.config)).stderr
        await wait_until(lambda: daemon.logged("request", status=401), "requests in the log")
        await daemon.stop()
    log = daemon.log.read_text()
    assert "of-the-lab" not in log
    assert "Bearer" not in log


async def test_what_takes_a_restart_is_said_and_changes_nothing_until_then(lab: Lab) -> None:
    port = free_port()
    async with running_daemon(lab.write(HOURLY).config) as daemon:
        await daemon.wait_for("API serves", socket=str(socket_of(lab)))
        lab.write(api_table(port, 'socket = "other.sock"') + HOURLY)
        daemon.send(signal.SIGHUP)
        await daemon.wait_for("a new api.socket takes a restart", socket=str(lab.directory / "other.sock"))
        await daemon.wait_for("a new api.listen takes a restart", listen=f"127.0.0.1:{port}")
        missing = await daemon.wait_for("invalid tokens or TLS; hypemand would not start with it")
        assert str(lab.directory / "tokens") in missing["error"]
        assert (await ask(socket_of(lab), SCHEDULE)).status == 200
        with pytest.raises(OSError, match="all attempts to connect"):
            await trio.open_tcp_stream("127.0.0.1", port)
        await daemon.stop()


async def test_many_idle_clients_delay_no_run_and_keep_nobody_out(lab: Lab) -> None:
    port = free_port()
    write_tokens(lab, FIRST)
    lab.write(api_table(port) + HOURLY)
    async with running_daemon(lab.config) as daemon, AsyncExitStack() as idle:
        await daemon.wait_for("API serves", listen=f"127.0.0.1:{port}")
        await daemon.wait_for("API serves", socket=str(socket_of(lab)))
        for number in range(100):
            for to in (port, socket_of(lab)):
                client = await idle.enter_async_context(await connect(to))
                await client.send_all(b"GET /half-a-request"[: number % 20])
        lab.make_due(daemon)
        assert (await ask(port, SCHEDULE, bearer(FIRST))).status == 200
        assert (await ask(socket_of(lab), SCHEDULE)).status == 200
        await daemon.wait_for("snapshot taken")
        await lab.recorded()
        await daemon.stop()
    (run,) = lab.history()
    assert run["outcome"] == "succeeded"
    assert run["late_s"] < GENEROUS_S


async def test_sigterm_ends_it_promptly_whatever_clients_are_about(lab: Lab) -> None:
    port = free_port()
    write_tokens(lab, FIRST)
    lab.write(api_table(port) + RUN_NOW, backend=SLOW, runs='shutdown_grace = "1s"')
    async with running_daemon(lab.config) as daemon, AsyncExitStack() as clients:
        await daemon.wait_for("API serves", listen=f"127.0.0.1:{port}")
        await daemon.wait_for("API serves", socket=str(socket_of(lab)))
        await lab.in_mid_capture()
        for to in (port, socket_of(lab)):
            for sent in (
                b"",
                b"GET / HT",
                head("PUT", SCHEDULE, bearer(FIRST), "Content-Length: 1000") + b"{",
                head("GET", "/snapshot-schedules", bearer(FIRST)) * 3000,
            ):
                client = await clients.enter_async_context(await connect(to))
                with trio.move_on_after(0.2):  # who does not read is not read either
                    await client.send_all(sent)
        daemon.send(signal.SIGTERM)
        assert await daemon.ended(within_s=GENEROUS_S) == 0
        assert not socket_of(lab).exists()
        assert not [line for line in daemon.lines() if line["level"] == "error" and "instance_id" not in line]
    assert lab.guest_state() == "Running"


async def test_a_second_daemon_on_the_same_state_does_not_touch_the_socket(lab: Lab) -> None:
    async with running_daemon(lab.write(HOURLY).config) as daemon:
        await daemon.wait_for("API serves")
        before = socket_of(lab).stat().st_ino
        second = await run_cli("run", "-c", lab.config)
        assert second.status == 75
        assert socket_of(lab).stat().st_ino == before
        assert (await ask(socket_of(lab), SCHEDULE)).status == 200
        await daemon.stop()
    assert not socket_of(lab).exists()


async def test_with_its_path_taken_it_runs_schedules_and_what_a_killed_one_left_is_replaced(lab: Lab) -> None:
    lab.write(HOURLY, runs=ALONE)
    lab.state.mkdir(mode=0o700)
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(socket_of(lab)))
        other.listen()
        async with running_daemon(lab.config) as daemon:
            told = await daemon.wait_for("API not reachable here; schedules go on, trying again")
            assert "another program listens" in told["error"]
            lab.make_due(daemon)
            await daemon.wait_for("snapshot taken")
            other.close()
            await daemon.wait_for("API serves")
            assert socket_of(lab).stat().st_mode & 0o777 == 0o660
            await daemon.kill()
    assert socket_of(lab).is_socket()
    async with running_daemon(lab.config) as daemon:
        await daemon.wait_for("API serves")
        assert (await ask(socket_of(lab))).status == 200
        await daemon.stop()
    assert not socket_of(lab).exists()


async def test_tcp_that_would_not_be_safe_is_refused_at_start_and_by_check_config(lab: Lab) -> None:
    lab.write(api_table(free_port(), f'tls_cert = "{TLS}/cert.pem"', f'tls_key = "{TLS}/other-key.pem"') + HOURLY)
    write_tokens(lab, FIRST, mode=0o644)
    for command in ("run", "check-config"):
        ran = await run_cli(command, "-c", lab.config)
        assert ran.status == 78
        assert "api.tokens_file: " in ran.stderr
        assert "others can read it (mode 0644); run: chmod 600" in ran.stderr
        assert "api.tls_key: " in ran.stderr
        assert "does not belong to the certificate" in ran.stderr
        assert FIRST not in ran.stderr
    assert not lab.state.exists()


async def test_the_systemd_credential_is_enough_for_tcp(lab: Lab) -> None:
    port = free_port()
    credentials = lab.directory / "credentials"
    credentials.mkdir()
    (credentials / "tokens").write_text(f"me:{FIRST}\n")
    (credentials / "tokens").chmod(0o440)
    lab.write(f'[api]\nlisten = "127.0.0.1:{port}"\n{HOURLY}')
    async with running_daemon(lab.config, env={"CREDENTIALS_DIRECTORY": str(credentials)}) as daemon:
        await daemon.wait_for("API serves", listen=f"127.0.0.1:{port}")
        assert (await ask(port, SCHEDULE, bearer(FIRST))).status == 200
        assert (await ask(port, SCHEDULE)).status == 401
        await daemon.stop()


async def test_a_client_is_told_how_its_run_ended_also_when_that_is_the_end(lab: Lab) -> None:
    lab.write(HOURLY, backend='copy_rate = "160KiB"')
    async with running_daemon(lab.config) as daemon:
        await daemon.wait_for("API serves")
        given = []
        async with trio.open_nursery() as nursery:

            async def run_now() -> None:
                given.append(await ask(socket_of(lab), f"{SCHEDULE}/run", method="POST", body=b""))

            nursery.start_soon(run_now)
            await lab.in_mid_capture()
            daemon.send(signal.SIGTERM)
        assert await daemon.ended(within_s=PATIENCE_S) == 0
    (answer,) = given
    assert answer.status == 200
    assert json.loads(answer.body)["outcome"] == "succeeded"
