"""Which snapshots a retention no longer keeps."""

from datetime import UTC, datetime, timedelta
from random import Random

import pytest
from attrs import evolve
from hypothesis import given
from hypothesis import strategies as st

from hypemand.core.model import InstanceId, Retention, Snapshot, SnapshotKind
from hypemand.core.naming import INSTANCE_TAG, SCHEDULED_TAG, scheduled_tags
from hypemand.core.retention import (
    CLOCK_SLACK,
    Expired,
    future_dated,
    outlived,
    scheduled_only,
    select_expired,
    without_age,
)
from tests.strategies import NOW, WEB, retentions, small_retentions, snapshot_lists

HOUR = timedelta(hours=1)
TICK = timedelta.resolution
IN_2036 = datetime(2036, 1, 1, tzinfo=UTC)

protected_ids = st.sets(st.integers(0, 999).map(lambda number: f"run-{number}"), max_size=300)


def taken(snapshot_id: str, created_at: datetime) -> Snapshot:
    return Snapshot(
        id=snapshot_id,
        instance_id=WEB,
        name=snapshot_id,
        kind=SnapshotKind.STANDBY,
        created_at=created_at,
        size_bytes=1,
        tags=scheduled_tags(WEB, {}),
    )


def hourly(count: int) -> list[Snapshot]:
    """*count* snapshots, newest first; the newest is an hour old."""
    return [taken(f"h{age}", NOW - age * HOUR) for age in range(1, count + 1)]


def ids(expired: tuple[Expired, ...]) -> list[str]:
    return [one.snapshot.id for one in expired]


@given(snapshot_lists(), small_retentions(), protected_ids)
def test_a_snapshot_expires_exactly_when_a_limit_says_so_and_nothing_protects_it(
    snapshots: list[Snapshot], retention: Retention, protected: set[str]
) -> None:
    def goes(one: Snapshot) -> bool:
        if one.id in protected or one.created_at > NOW + CLOCK_SLACK:
            return False
        newer = [
            other
            for other in snapshots
            if other.created_at <= NOW + CLOCK_SLACK and (other.created_at, other.id) > (one.created_at, one.id)
        ]
        too_many = bool(retention.max_count) and len(newer) >= (retention.max_count or 0)
        too_old = bool(retention.max_age) and NOW - one.created_at > (retention.max_age or HOUR)
        return too_many or too_old

    expired = select_expired(snapshots, retention, now=NOW, protected=protected)
    assert {one.snapshot.id for one in expired} == {one.id for one in snapshots if goes(one)}


@given(snapshot_lists(), small_retentions())
def test_protected_snapshots_never_expire(snapshots: list[Snapshot], retention: Retention) -> None:
    for one in snapshots:
        assert one.id not in ids(select_expired(snapshots, retention, now=NOW, protected={one.id}))
    assert select_expired(snapshots, retention, now=NOW, protected=[one.id for one in snapshots]) == ()


@given(snapshot_lists(), snapshot_lists(InstanceId("web-2")), snapshot_lists())
def test_manual_snapshots_and_those_of_other_instances_never_expire(
    ours: list[Snapshot], others: list[Snapshot], manual: list[Snapshot]
) -> None:
    by_hand = [evolve(one, id=f"manual-{one.id}", tags={"team": "backend"}) for one in manual]
    expired = select_expired(
        scheduled_only(WEB, [*by_hand, *others, *ours]), Retention(max_age=TICK), now=NOW, protected=()
    )
    assert expired == select_expired(ours, Retention(max_age=TICK), now=NOW, protected=())


@pytest.mark.parametrize(
    ("tags", "scheduled"),
    [
        ({SCHEDULED_TAG: "true", INSTANCE_TAG: "web-1"}, True),
        ({SCHEDULED_TAG: "true", INSTANCE_TAG: "web-1", "team": "backend"}, True),
        ({SCHEDULED_TAG: "true"}, False),
        ({INSTANCE_TAG: "web-1"}, False),
        ({SCHEDULED_TAG: "false", INSTANCE_TAG: "web-1"}, False),
        ({SCHEDULED_TAG: "True", INSTANCE_TAG: "web-1"}, False),
        ({SCHEDULED_TAG: "true", INSTANCE_TAG: "web-2"}, False),
        ({}, False),
    ],
)
def test_both_tags_make_a_snapshot_a_scheduled_one(tags: dict[str, str], scheduled: bool) -> None:
    snapshot = evolve(taken("a", NOW), tags=tags)
    assert scheduled_only(WEB, [snapshot]) == ((snapshot,) if scheduled else ())


def test_a_copied_tag_does_not_make_another_instances_snapshot_ours() -> None:
    assert scheduled_only(WEB, [evolve(taken("a", NOW), instance_id=InstanceId("web-2"))]) == ()


@given(snapshot_lists(), small_retentions(), st.timedeltas(CLOCK_SLACK + TICK, timedelta(days=9999)))
def test_snapshots_dated_in_the_future_neither_expire_nor_count(
    snapshots: list[Snapshot], retention: Retention, ahead: timedelta
) -> None:
    strange = taken("strange", NOW + ahead)
    without = select_expired(snapshots, retention, now=NOW, protected=())
    assert select_expired([strange, *snapshots], retention, now=NOW, protected=()) == without
    assert strange in future_dated([strange, *snapshots], NOW)


def test_one_dated_2036_changes_nothing_for_the_others() -> None:
    retention = Retention(max_count=2)
    snapshots = hourly(4)
    assert ids(select_expired([*snapshots, taken("2036", IN_2036)], retention, now=NOW, protected=())) == ["h4", "h3"]
    assert ids(select_expired(snapshots, retention, now=NOW, protected=())) == ["h4", "h3"]
    assert [one.id for one in future_dated([*snapshots, taken("2036", IN_2036)], NOW)] == ["2036"]


def test_one_dated_within_the_slack_of_clocks_counts() -> None:
    within, beyond = taken("within", NOW + CLOCK_SLACK), taken("beyond", NOW + CLOCK_SLACK + TICK)
    retention = Retention(max_count=1)
    assert ids(select_expired([*hourly(1), within], retention, now=NOW, protected=())) == ["h1"]
    assert ids(select_expired([*hourly(1), beyond], retention, now=NOW, protected=())) == []
    assert future_dated([within, beyond], NOW) == (beyond,)


@given(snapshot_lists(), small_retentions(), protected_ids)
def test_what_both_limits_keep_is_kept(snapshots: list[Snapshot], retention: Retention, protected: set[str]) -> None:
    dated = [one for one in snapshots if one.created_at <= NOW + CLOCK_SLACK]
    gone = set(ids(select_expired(snapshots, retention, now=NOW, protected=protected)))
    if retention.max_count:
        kept_at_least = [one for one in dated if not retention.max_age or one.created_at >= NOW - retention.max_age]
        assert len(dated) - len(gone) >= min(retention.max_count, len(kept_at_least))
    if retention.max_age:
        young = {one.id for one in dated if one.created_at >= NOW - retention.max_age}
        assert retention.max_count or not gone & young


@given(snapshot_lists(), small_retentions())
def test_reasons_are_never_empty_and_name_the_limit_that_they_come_from(
    snapshots: list[Snapshot], retention: Retention
) -> None:
    alone = {
        "max_count": ids(select_expired(snapshots, evolve(retention, max_age=None), now=NOW, protected=())),
        "max_age": ids(select_expired(snapshots, evolve(retention, max_count=None), now=NOW, protected=())),
    }
    for expired in select_expired(snapshots, retention, now=NOW, protected=()):
        named = [reason.split(" ")[0] for reason in expired.reasons]
        assert named
        assert named == [limit for limit, gone in alone.items() if expired.snapshot.id in gone]


def test_reasons_tell_the_limit_and_how_far_the_snapshot_is_beyond_it() -> None:
    snapshots = [*hourly(2), taken("old", NOW - timedelta(days=8, seconds=1.5))]
    retention = Retention(max_age=timedelta(days=7), max_count=1)
    by_id = {one.snapshot.id: one.reasons for one in select_expired(snapshots, retention, now=NOW, protected=())}
    assert by_id == {
        "old": ("max_count 1: it is number 3, counted from the newest", "max_age 168h: it is 192h1s old"),
        "h2": ("max_count 1: it is number 2, counted from the newest",),
    }


@given(snapshot_lists(), small_retentions())
def test_the_oldest_come_first(snapshots: list[Snapshot], retention: Retention) -> None:
    times = [one.snapshot.created_at for one in select_expired(snapshots, retention, now=NOW, protected=())]
    assert times == sorted(times)


@given(snapshot_lists().flatmap(lambda some: st.tuples(st.just(some), st.permutations(some))), small_retentions())
def test_the_order_of_the_input_is_irrelevant_and_left_alone(
    orders: tuple[list[Snapshot], list[Snapshot]], retention: Retention
) -> None:
    one, other = orders
    before = list(one)
    found = select_expired(one, retention, now=NOW, protected=())
    assert found == select_expired(other, retention, now=NOW, protected=())
    assert one == before


def test_of_two_at_the_same_instant_the_same_one_expires_always() -> None:
    pair = [taken("a", NOW), taken("b", NOW)]
    for snapshots in (pair, pair[::-1]):
        assert ids(select_expired(snapshots, Retention(max_count=1), now=NOW, protected=())) == ["a"]


@given(snapshot_lists(), st.sampled_from([None, timedelta(0)]), st.sampled_from([None, 0]))
def test_no_limits_keep_all(snapshots: list[Snapshot], max_age: timedelta | None, max_count: int | None) -> None:
    retention = Retention(max_age, max_count)
    assert retention.keeps_everything
    assert select_expired(snapshots, retention, now=NOW, protected=()) == ()


@pytest.mark.parametrize("retention", [Retention(max_age=HOUR), Retention(max_count=1), Retention(TICK, 0)])
def test_a_retention_with_a_limit_does_not_keep_everything(retention: Retention) -> None:
    assert not retention.keeps_everything
    assert "h3" in ids(select_expired(hourly(3), retention, now=NOW, protected=()))


def test_a_max_count_of_zero_is_no_limit_beside_an_age() -> None:
    assert ids(select_expired(hourly(9), Retention(8 * HOUR, 0), now=NOW, protected=())) == ["h9"]


def test_one_exactly_max_age_old_is_kept() -> None:
    snapshots = [taken("at", NOW - HOUR), taken("past", NOW - HOUR - TICK)]
    assert ids(select_expired(snapshots, Retention(max_age=HOUR), now=NOW, protected=())) == ["past"]


def test_either_limit_expires() -> None:
    assert ids(select_expired(hourly(5), Retention(2 * HOUR, 4), now=NOW, protected=())) == ["h5", "h4", "h3"]
    assert ids(select_expired(hourly(5), Retention(4 * HOUR, 2), now=NOW, protected=())) == ["h5", "h4", "h3"]


def test_protected_ones_count_towards_max_count() -> None:
    assert ids(select_expired(hourly(4), Retention(max_count=2), now=NOW, protected={"h1"})) == ["h4", "h3"]
    assert ids(select_expired(hourly(4), Retention(max_count=2), now=NOW, protected={"h4"})) == ["h3"]


@given(snapshot_lists(), retentions())
def test_without_age_nothing_expires_by_age_and_all_else_stays(snapshots: list[Snapshot], retention: Retention) -> None:
    careful = without_age(retention)
    assert (careful.max_age, careful.max_count, careful.extra) == (None, retention.max_count, retention.extra)
    for expired in select_expired(snapshots, careful, now=NOW, protected=()):
        assert [reason.split(" ")[0] for reason in expired.reasons] == ["max_count"]


@pytest.mark.parametrize(
    ("retention", "left", "done"),
    [
        (Retention(), 0, True),
        (Retention(max_age=HOUR, max_count=3), 0, True),
        (Retention(), 1, False),
        (Retention(max_count=0), 1, False),
        (Retention(max_count=3), 4, False),
        (Retention(max_count=3), 3, True),
        (Retention(max_count=3), 1, True),
        (Retention(timedelta(0), 3), 3, True),
        (Retention(HOUR, 3), 3, False),
        (Retention(HOUR, 0), 1, False),
        (Retention(max_age=HOUR), 1, False),
    ],
)
def test_the_schedule_of_a_gone_instance_ends_when_pruning_can_do_no_more(
    retention: Retention,
    left: int,
    done: bool,
) -> None:
    assert outlived(hourly(left), retention) is done


def test_a_snapshot_dated_too_early_counts_in_the_order_in_which_it_was_made() -> None:
    in_1970 = [taken(f"wrong{n}", datetime(1970, 1, 1, n, tzinfo=UTC)) for n in (1, 2)]
    before = [taken(f"old{age}", NOW - age * HOUR) for age in (9, 8, 7)]
    newest = taken("new", NOW)
    made = [one.id for one in (*before, *in_1970, newest)]
    kept = [*before, *in_1970, newest]
    by_count = select_expired(kept, Retention(max_count=3), now=NOW, protected=(), made=made)
    assert ids(by_count) == ["old9", "old8", "old7"]
    by_age = select_expired(kept, Retention(max_age=8 * HOUR), now=NOW, protected=(), made=made)
    assert ids(by_age) == ["old9"]
    later = select_expired(kept, Retention(max_age=8 * HOUR), now=NOW + 9 * HOUR, protected={"new"}, made=made)
    assert ids(later) == ["old9", "old8", "old7", "wrong1", "wrong2"]
    assert select_expired([*before, *in_1970], Retention(max_age=10 * HOUR), now=NOW, protected=(), made=made) == ()


@given(snapshot_lists(), small_retentions(), st.randoms())
def test_an_order_that_the_dates_agree_with_changes_nothing(
    snapshots: list[Snapshot], retention: Retention, chance: Random
) -> None:
    in_order = [one.id for one in sorted(snapshots, key=lambda s: (s.created_at, s.id))]
    known = [one for one in in_order if chance.random() < 0.5]
    by_dates = select_expired(snapshots, retention, now=NOW, protected=())
    assert select_expired(snapshots, retention, now=NOW, protected=(), made=in_order) == by_dates
    if len({one.created_at for one in snapshots}) == len(snapshots):
        assert select_expired(snapshots, retention, now=NOW, protected=(), made=known) == by_dates
