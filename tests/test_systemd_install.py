"""docs/install.md, word for word: from a wheel to a service that runs, to a newer one, and to nothing."""

import json
import shutil
from pathlib import Path

from tests.systemd_service import STATE, Service, do_as_the_page_says, page_commands

A_WHILE = 'copy_rate = "512KiB"'


def test_it_runs_is_upgraded_in_mid_capture_and_removed_as_the_page_says(service: Service, installed: Path) -> None:
    _, drop_in, start = page_commands("Install")
    upgrade, (remove, rid_of_all) = page_commands("Upgrade")[0], page_commands("Remove")
    box = service.box
    shutil.copytree(installed / "wheels", box.out / "wheels")
    box.sh("groupadd vms")
    do_as_the_page_says(box, f"EDITOR=true; cd /opt/hypemand/share/hypemand\n{drop_in}")
    service.configure(backend=A_WHILE)
    box.sh(f"PATH=/usr/local/bin:$PATH\n{start}")
    service.in_mid_capture()
    before = service.main_pid()
    do_as_the_page_says(box, upgrade.replace("--upgrade", "--upgrade --force-reinstall --no-deps"))
    assert service.main_pid() not in (0, before)
    service.hypemand("run-now", "web-1")
    assert [run["outcome"] for run in service.history()] == ["succeeded"] * 2

    box.sh(remove)
    assert box.ask("systemctl", "cat", "hypemand").returncode != 0
    left = box.sh("find /etc /opt /run /usr/local /var/lib -name '*hypemand*' -prune | sort")
    assert left.split() == ["/etc/hypemand", "/etc/systemd/system/hypemand.service.d", "/var/lib/hypemand"]
    owner = box.path(STATE).stat().st_uid
    assert owner != 0
    assert box.run("id", "-u", "hypemand").strip() == str(owner)
    assert len([*box.path(f"{STATE}/lab/snapshots/web-1").iterdir()]) == 2
    box.sh(rid_of_all)
    assert not box.path(STATE).exists()
    assert box.ask("id", "hypemand").returncode != 0


def test_state_of_a_newer_version_is_refused_and_left_as_it_is(service: Service) -> None:
    service.configure(schedule="")
    service.start()
    box = service.box
    box.run("systemctl", "stop", "hypemand")
    path = box.path(f"{STATE}/schedules/web-1.json")
    path.write_text(newer := json.dumps(json.loads(path.read_text()) | {"format": 99}))
    files = box.sh(f"cd {STATE}; find . -type f ! -name lock | sort | xargs md5sum")
    assert box.ask("systemctl", "start", "hypemand").returncode != 0
    assert box.show("hypemand", "ExecMainStatus") == "78"
    assert box.show("hypemand", "NRestarts") == "0"
    assert path.read_text() == newer
    assert box.sh(f"cd {STATE}; find . -type f ! -name lock | sort | xargs md5sum") == files
    shown = box.ask("systemctl", "status", "hypemand", "--no-pager", "--full").stdout
    assert "the state is that of a newer hypemand" in shown
    assert "web-1.json" in shown
