"""Snapshots on disk: what is listed is complete, what is damaged is left alone."""

import subprocess
from datetime import datetime, timedelta
from pathlib import Path

import orjson
import pytest
from attrs import evolve
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from structlog.typing import EventDict

from hypemand.backends.base import BackendUnavailable
from hypemand.backends.catalog import FORMAT, MANIFEST, MARKER, Catalog, Manifest
from hypemand.core.model import InstanceId, RestoreAction, RestoreStep, SnapshotKind
from tests.strategies import NOW, WEB, extras, instance_ids, instants, int64s, json_values, metadata, restore_steps


@pytest.fixture
def catalog(tmp_path: Path) -> Catalog:
    made = Catalog(tmp_path / "snapshots")
    made.open(first_use=True)
    return made


def manifest_of(snapshot_id: str = "run-1", at: datetime = NOW) -> Manifest:
    return Manifest(
        id=snapshot_id,
        instance_id=WEB,
        name=f"scheduled-{snapshot_id}",
        kind=SnapshotKind.STOPPED,
        tags={},
        created_at=at,
        size_bytes=5,
        files={"disk": 5},
    )


def drafted(catalog: Catalog, manifest: Manifest) -> Path:
    partial = catalog.begin(manifest.instance_id, manifest.id)
    (partial / "disk").write_bytes(b"bytes")
    catalog.write_manifest(manifest)
    return partial


def published(catalog: Catalog, snapshot_id: str = "run-1", at: datetime = NOW) -> Path:
    manifest = manifest_of(snapshot_id, at)
    drafted(catalog, manifest)
    catalog.publish(WEB, snapshot_id)
    return catalog.root / WEB / snapshot_id


def ids(catalog: Catalog) -> list[str]:
    return [manifest.id for manifest in catalog.manifests(WEB)]


def manifests() -> st.SearchStrategy[Manifest]:
    words = st.dictionaries(st.text(max_size=12), st.text(max_size=12), max_size=3)
    return st.builds(
        Manifest,
        id=st.uuids().map(str),
        instance_id=instance_ids(),
        name=st.text(max_size=20),
        kind=st.sampled_from(SnapshotKind),
        tags=metadata(),
        created_at=instants(),
        size_bytes=int64s,
        files=st.dictionaries(st.text(max_size=12), int64s, max_size=3),
        hypervisor=words,
        restore=restore_steps(),
        details=st.dictionaries(st.text(max_size=8), json_values(), max_size=3),
        extra=extras(Manifest),
    )


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(manifests())
def test_a_manifest_is_read_as_it_was_written_with_keys_that_are_not_known(
    catalog: Catalog, manifest: Manifest
) -> None:
    catalog.begin(manifest.instance_id, manifest.id)
    catalog.write_manifest(manifest)
    assert catalog.draft(manifest.instance_id, manifest.id) == manifest
    catalog.publish(manifest.instance_id, manifest.id)
    assert catalog.find(manifest.instance_id, manifest.id) == manifest
    assert catalog.manifests(manifest.instance_id) == [manifest]
    catalog.delete(manifest.instance_id, manifest.id)


def test_a_snapshot_is_listed_with_its_payload_once_it_is_published(
    catalog: Catalog, heard_log: list[EventDict]
) -> None:
    partial = drafted(catalog, manifest_of())
    assert ids(catalog) == []
    assert catalog.find(WEB, "run-1") is None
    assert heard_log == []
    catalog.publish(WEB, "run-1")
    assert catalog.manifests(WEB) == [manifest_of()]
    assert (catalog.root / WEB / "run-1" / "disk").read_bytes() == b"bytes"
    assert not partial.exists()
    assert catalog.draft(WEB, "run-1") is None


def test_a_snapshot_comes_with_the_way_back_to_it(catalog: Catalog) -> None:
    steps = (RestoreStep(RestoreAction.RUN, "cp 'a b' c"), RestoreStep(RestoreAction.MONITOR, "cont"))
    drafted(catalog, evolve(manifest_of(), restore=steps))
    catalog.publish(WEB, "run-1")
    found = catalog.find(WEB, "run-1")
    assert found is not None
    assert found.snapshot().restore == steps
    document = orjson.loads((catalog.home(WEB, "run-1") / MANIFEST).read_bytes())
    assert document["restore"][1] == {"action": "monitor", "command": "cont"}


def test_publishing_is_idempotent(catalog: Catalog) -> None:
    published(catalog)
    catalog.publish(WEB, "run-1")
    assert ids(catalog) == ["run-1"]


def test_a_snapshot_that_was_never_begun_can_not_be_published(catalog: Catalog) -> None:
    with pytest.raises(FileNotFoundError):
        catalog.publish(WEB, "run-1")
    assert ids(catalog) == []


def test_snapshots_come_oldest_first_and_by_id_where_they_are_as_old(catalog: Catalog) -> None:
    published(catalog, "c", NOW - timedelta(days=1))
    for snapshot_id in ("b", "a"):
        published(catalog, snapshot_id)
    assert ids(catalog) == ["c", "a", "b"]


def test_snapshots_of_another_instance_are_not_listed(catalog: Catalog) -> None:
    published(catalog)
    assert catalog.manifests(InstanceId("web-10")) == []


@pytest.mark.parametrize(
    "damage",
    [
        b"",
        b"\xff\xfe",
        b"[]",
        b'{"id": "run-1"}',
        orjson.dumps({"id": 1, "instance_id": "../up", "created_at": "yesterday"}),
    ],
)
def test_a_damaged_manifest_is_passed_over_and_its_snapshot_left_alone(
    catalog: Catalog, damage: bytes, heard_log: list[EventDict]
) -> None:
    damaged = published(catalog, "damaged")
    (damaged / MANIFEST).write_bytes(damage)
    published(catalog, "whole", NOW + timedelta(hours=1))
    assert ids(catalog) == ["whole"]
    assert [(entry["log_level"], entry["path"]) for entry in heard_log] == [("error", str(damaged))]
    assert catalog.find(WEB, "damaged") is None
    catalog.delete(WEB, "whole")
    catalog.discard(WEB, "damaged")
    assert (damaged / "disk").read_bytes() == b"bytes"
    assert (damaged / MANIFEST).read_bytes() == damage


def test_a_snapshot_without_a_manifest_is_passed_over_and_left_alone(catalog: Catalog) -> None:
    bare = catalog.root / WEB / "by-hand"
    bare.mkdir(parents=True)
    assert ids(catalog) == []
    assert bare.is_dir()


def test_a_copy_that_somebody_made_of_a_snapshot_is_neither_listed_nor_deleted(catalog: Catalog) -> None:
    original = published(catalog)
    original.rename(original.with_name("keep-this"))
    published(catalog)
    assert ids(catalog) == ["run-1"]
    catalog.delete(WEB, "run-1")
    assert (catalog.root / WEB / "keep-this" / "disk").read_bytes() == b"bytes"


def test_a_manifest_of_a_newer_format_is_passed_over(catalog: Catalog) -> None:
    drafted(catalog, evolve(manifest_of(), format=FORMAT + 1))
    catalog.publish(WEB, "run-1")
    assert ids(catalog) == []
    assert (catalog.root / WEB / "run-1").is_dir()


def test_a_catalog_without_its_marker_is_unavailable(catalog: Catalog) -> None:
    snapshot = published(catalog)
    (catalog.root / MARKER).unlink()
    with pytest.raises(BackendUnavailable, match="mounted"):
        catalog.manifests(WEB)
    with pytest.raises(BackendUnavailable):
        catalog.find(WEB, "run-1")
    with pytest.raises(BackendUnavailable):
        catalog.draft(WEB, "run-1")
    with pytest.raises(BackendUnavailable):
        catalog.begin(WEB, "run-2")
    with pytest.raises(BackendUnavailable):
        catalog.publish(WEB, "run-1")
    with pytest.raises(BackendUnavailable):
        catalog.discard(WEB, "run-1")
    with pytest.raises(BackendUnavailable):
        catalog.delete(WEB, "run-1")
    with pytest.raises(BackendUnavailable):
        catalog.open(first_use=False)
    assert not (catalog.root / MARKER).exists()
    assert snapshot.is_dir()


def test_what_the_missing_marker_tells_to_run_makes_it_available(catalog: Catalog) -> None:
    published(catalog)
    (catalog.root / MARKER).unlink()
    (catalog.root / MARKER).touch()
    catalog.open(first_use=False)
    assert ids(catalog) == ["run-1"]


def test_a_missing_directory_is_made_on_first_use_alone(tmp_path: Path) -> None:
    catalog = Catalog(tmp_path / "a" / "b")
    with pytest.raises(BackendUnavailable):
        catalog.open(first_use=False)
    assert not catalog.root.exists()
    catalog.open(first_use=True)
    catalog.open(first_use=True)
    catalog.open(first_use=False)
    assert catalog.manifests(WEB) == []


def test_a_directory_that_can_not_be_made_is_unavailable(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(BackendUnavailable, match="Not a directory"):
        Catalog(tmp_path / "file" / "snapshots").open(first_use=True)


def test_an_instance_directory_that_can_not_be_read_is_unavailable(catalog: Catalog) -> None:
    (catalog.root / WEB).touch()
    with pytest.raises(BackendUnavailable):
        catalog.manifests(WEB)


def test_deleting_a_snapshot_that_is_gone_is_no_error(catalog: Catalog) -> None:
    catalog.delete(WEB, "never-was")
    published(catalog)
    for _ in range(2):
        catalog.delete(WEB, "run-1")
    assert ids(catalog) == []


def test_deleting_sweeps_what_an_interrupted_deletion_left(catalog: Catalog) -> None:
    published(catalog, "older").rename(catalog.root / WEB / ".older.deleted")
    published(catalog, "run-1")
    catalog.delete(WEB, "run-1")
    assert list((catalog.root / WEB).iterdir()) == []


def test_a_snapshot_is_deleted_though_an_earlier_deletion_of_its_id_ended_halfway(catalog: Catalog) -> None:
    published(catalog).rename(catalog.root / WEB / ".run-1.deleted")
    published(catalog)
    catalog.delete(WEB, "run-1")
    assert list((catalog.root / WEB).iterdir()) == []


def test_a_discarded_snapshot_can_not_be_published_and_leaves_nothing(catalog: Catalog) -> None:
    drafted(catalog, manifest_of())
    for _ in range(2):
        catalog.discard(WEB, "run-1")
    assert list((catalog.root / WEB).iterdir()) == []
    with pytest.raises(FileNotFoundError):
        catalog.publish(WEB, "run-1")


def test_discarding_leaves_a_published_snapshot_alone(catalog: Catalog) -> None:
    published(catalog)
    catalog.discard(WEB, "run-1")
    assert ids(catalog) == ["run-1"]


def test_beginning_anew_starts_from_an_empty_directory(catalog: Catalog) -> None:
    drafted(catalog, manifest_of())
    assert list(catalog.begin(WEB, "run-1").iterdir()) == []
    assert catalog.draft(WEB, "run-1") is None


def test_a_leftover_that_cannot_be_removed_spoils_no_deletion(catalog: Catalog, heard_log: list[EventDict]) -> None:
    stuck = catalog.root / WEB / ".dead.deleted"
    published(catalog, "run-1")
    stuck.mkdir()
    (stuck / "x").touch()
    (stuck / "x").chmod(0o400)
    made = subprocess.run(["chattr", "+i", stuck / "x"], capture_output=True, check=False)
    try:
        catalog.delete(WEB, "run-1")
    finally:
        subprocess.run(["chattr", "-i", stuck / "x"], capture_output=True, check=False)
    assert ids(catalog) == []
    if made.returncode == 0:  # by root, where the filesystem knows it
        assert [str(stuck) in str(entry["path"]) for entry in heard_log] == [True]


def test_what_an_earlier_deletion_of_the_same_id_left_is_no_obstacle(catalog: Catalog) -> None:
    published(catalog, "run-1")
    (catalog.root / WEB / ".run-1.deleted").mkdir()
    catalog.delete(WEB, "run-1")
    assert ids(catalog) == []
    assert list(catalog.root.joinpath(WEB).iterdir()) == []
