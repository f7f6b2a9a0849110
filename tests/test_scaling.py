"""How many replicas a load needs: bounds, order, rest, and what is done when little is known."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.load import Figures, Load
from cluster.scaling import STALE_S, Waiting, Wish, after_delay, replicas_wanted
from cluster.serve_settings import ServeSettings
from workers.backlog import Backlog

NOW = 1000.0
ONE_TO_FIVE = ServeSettings(min_replicas=1, max_replicas=5, target_drain_s=10, max_oldest_s=30)


def figures(
    lag: int = 0,
    arriving_per_s: float = 0.0,
    judged_per_s: float | None = 10.0,
    *,
    untaken: int | None = None,
    oldest_s: float | None = None,
    replicas: int = 1,
    idle_s: float = 0.0,
    read_at: float = NOW,
) -> Figures:
    untaken = lag if untaken is None else untaken
    return Figures(read_at, lag, untaken, oldest_s, arriving_per_s, replicas, judged_per_s, idle_s)


@st.composite
def settings_(draw: st.DrawFn) -> ServeSettings:
    least = draw(st.integers(1, 8))
    return ServeSettings(
        min_replicas=least,
        max_replicas=draw(st.integers(least, 20)),
        target_drain_s=draw(st.floats(0.1, 1000)),
        max_oldest_s=draw(st.sampled_from([0.0, 5.0, 60.0])),
        scale_down_idle_s=draw(st.floats(0, 100)),
    )


@st.composite
def loads(draw: st.DrawFn) -> Figures:
    lag = draw(st.integers(0, 100_000))
    return figures(
        lag,
        draw(st.floats(0, 1e5)),
        draw(st.none() | st.floats(0, 1e4)),
        untaken=draw(st.integers(0, lag)),
        oldest_s=draw(st.none() | st.floats(0, 1e4)),
        replicas=draw(st.integers(0, 30)),
        idle_s=draw(st.floats(0, 200)),
        read_at=NOW - draw(st.floats(0, 2 * STALE_S)),
    )


# --- the number


@pytest.mark.parametrize(
    ("load", "current", "wanted", "reason"),
    [
        (figures(0), 3, 1, "nothing waits, 1 will do"),
        (figures(840, 0, 40), 1, 3, "lag 840 needs 3 to drain in 10 s"),
        (figures(840, 0, 40), 2, 3, "lag 840 needs 3 to drain in 10 s"),
        (figures(10_000, 0, 40), 2, 5, "lag 10000 needs 25 to drain in 10 s, 5 is the most"),
        (figures(10, 18), 2, 2, "lag 10 needs 2 to drain in 10 s"),
        (figures(10, 8), 4, 2, "lag 10 needs 1 to drain in 10 s, 2 leaves room"),
        (figures(10, 6), 4, 1, "lag 10 needs 1 to drain in 10 s"),
        (figures(50, 8, None), 2, 2, "lag 50, speed of a replica not known yet, 2 kept"),
        (figures(50, 8, 0.0), 2, 2, "lag 50, speed of a replica not known yet, 2 kept"),
        (figures(10, oldest_s=31, replicas=2), 2, 3, "a frame of 31 s is older than 30 s, 3 needed"),
        (figures(10, oldest_s=31, replicas=1), 2, 2, "a frame of 31 s is older than 30 s, 2 needed"),
        (figures(10, untaken=0, oldest_s=31, replicas=2), 2, 2, "a frame of 31 s is older than 30 s, 2 needed"),
        (figures(10, oldest_s=29, replicas=2), 1, 1, "lag 10 needs 1 to drain in 10 s"),
        (figures(idle_s=31), 4, 1, "nothing waits for 31 s, 1 kept"),
        (None, 3, 3, "no figures yet"),
        (None, 9, 5, "no figures yet"),
        (figures(100_000, read_at=NOW - 7), 2, 2, "no figures for 7 s, 2 kept"),
    ],
)
def test_the_number_and_its_reason(load, current, wanted, reason):
    wish = replicas_wanted(load, ONE_TO_FIVE, current, NOW)
    assert (wish.replicas, wish.reason) == (wanted, reason)


def test_no_limit_of_age_by_zero():
    settings = ONE_TO_FIVE.model_copy(update={"max_oldest_s": 0.0})
    assert replicas_wanted(figures(10, oldest_s=1e6), settings, 1, NOW).replicas == 1


@given(loads(), settings_(), st.integers(0, 40))
def test_the_number_is_within_its_bounds(load, settings, current):
    wish = replicas_wanted(load, settings, current, NOW)
    assert settings.least <= wish.replicas <= settings.most
    assert load is None or str(wish.replicas) in wish.reason


@given(loads(), settings_(), st.integers(1, 20), st.integers(0, 100_000))
def test_more_lag_never_wants_fewer(load, settings, current, more):
    grown = figures(
        load.lag + more,
        load.arriving_per_s,
        load.judged_per_s,
        untaken=load.untaken,
        oldest_s=load.oldest_s,
        replicas=load.replicas,
        idle_s=load.idle_s,
        read_at=load.read_at,
    )
    before = replicas_wanted(load, settings, current, NOW).replicas
    unknown = not load.judged_per_s and load.lag == 0  # an empty stream needs no known speed
    assert replicas_wanted(grown, settings, current, NOW).replicas >= before or unknown


@given(loads(), settings_(), st.integers(1, 20))
def test_a_steady_load_is_answered_once(load, settings, current):
    first = replicas_wanted(load, settings, current, NOW).replicas
    assert replicas_wanted(load, settings, first, NOW).replicas == first


@given(st.integers(0, 100_000), st.floats(1e-3, 1e4), settings_(), st.integers(1, 20), st.floats(0.81, 1.0))
def test_a_load_that_falls_by_less_than_a_fifth_after_a_rise_changes_nothing(lag, arriving, settings, current, share):
    load = figures(lag, arriving)
    settled = replicas_wanted(load, settings, current, NOW).replicas
    less = figures(lag, arriving * share - lag / settings.target_drain_s * (1 - share))
    again = replicas_wanted(less, settings, settled, NOW).replicas
    if settled > settings.bounded(current) and less.arriving_per_s > 0:
        assert again == settled


@given(settings_(), st.integers(1, 20), loads())
def test_an_unknown_speed_and_old_figures_change_nothing(settings, current, load):
    kept = settings.bounded(current)
    old = figures(load.lag, load.arriving_per_s, read_at=NOW - STALE_S - 0.1)
    assert replicas_wanted(old, settings, current, NOW).replicas == kept
    unknown = figures(load.lag + 1, load.arriving_per_s, None, idle_s=-1.0)
    assert replicas_wanted(unknown, settings, current, NOW).replicas == kept


# --- the delays


def test_more_replicas_come_after_their_delay_by_the_latest_wish():
    settings = ServeSettings(max_replicas=5, scale_up_delay_s=2)
    number, waiting = after_delay(Wish(2, ""), None, settings, 1, 10.0)
    assert (number, waiting) == (1, Waiting(10.0, 2, True))
    number, waiting = after_delay(Wish(4, ""), waiting, settings, 1, 11.9)
    assert number == 1
    assert after_delay(Wish(3, ""), waiting, settings, 1, 12.0) == (3, None)


def test_fewer_come_after_theirs_by_the_largest_wish_meanwhile():
    settings = ServeSettings(replicas=5, min_replicas=1, scale_down_delay_s=60)
    number, waiting = after_delay(Wish(3, ""), None, settings, 5, 0.0)
    number, waiting = after_delay(Wish(1, ""), waiting, settings, 5, 30.0)
    assert number == 5
    assert after_delay(Wish(1, ""), waiting, settings, 5, 60.0) == (3, None)


def test_a_wish_for_the_current_number_or_the_other_way_starts_the_delay_anew():
    settings = ServeSettings(min_replicas=1, max_replicas=5, scale_up_delay_s=2, scale_down_delay_s=2)
    _, waiting = after_delay(Wish(5, ""), None, settings, 3, 0.0)
    assert after_delay(Wish(3, ""), waiting, settings, 3, 1.0) == (3, None)
    number, waiting = after_delay(Wish(2, ""), waiting, settings, 3, 2.5)
    assert (number, waiting) == (3, Waiting(2.5, 2, False))


def test_idle_replicas_go_at_once():
    settings = ServeSettings(replicas=5, min_replicas=1, scale_down_delay_s=60)
    assert after_delay(Wish(1, "", at_once=True), None, settings, 5, 0.0) == (1, None)


# --- the figures


class Line:
    """A line that is looked at twice a second; what is not judged at once waits and nobody has taken it."""

    def __init__(self) -> None:
        self._load, self._looks, self._settled, self.lag = Load(), 0, 0.0, 0.0

    def run(self, seconds: float, *, fps: float, arriving: float = 0.0, replicas: int = 1) -> Figures:
        """Let so many replicas settle `fps` frames a second each; return the last figures."""
        for _ in range(int(seconds * 2)):
            judged = min(self.lag + arriving / 2, replicas * fps / 2)
            self._settled, self.lag = self._settled + judged, self.lag + arriving / 2 - judged
            self._looks += 1
            backlog = Backlog(int(self.lag), int(self.lag), int(self._settled), None)
            seen = self._load.add(NOW + self._looks / 2, backlog, replicas)
        return seen


def test_the_speed_of_a_replica_is_known_after_two_seconds_of_backlog():
    line = Line()
    line.lag = 1000
    assert line.run(2.0, fps=20, replicas=3).judged_per_s is None
    assert line.run(0.5, fps=20, replicas=3).judged_per_s == pytest.approx(20)


def test_replicas_that_keep_up_do_not_show_their_speed():
    seen = Line().run(20.0, fps=100, arriving=30)
    assert seen.judged_per_s is None
    assert seen.arriving_per_s == pytest.approx(30)


def test_a_quiet_time_lowers_no_known_speed_and_a_busy_one_does():
    line = Line()
    line.lag = 400
    assert line.run(10.0, fps=20).judged_per_s == pytest.approx(20)
    assert line.run(30.0, fps=20, arriving=2).judged_per_s == pytest.approx(20)
    assert line.lag == 0
    line.lag = 1000
    assert line.run(30.0, fps=5).judged_per_s == pytest.approx(5, rel=0.1)


def test_a_quiet_time_that_is_faster_than_known_raises_the_speed():
    line = Line()
    line.lag = 100
    assert line.run(5.0, fps=20).judged_per_s == pytest.approx(20)
    assert line.run(20.0, fps=100, arriving=60).judged_per_s == pytest.approx(60)


def test_a_standstill_is_not_taken_for_the_speed():
    line = Line()
    line.lag = 1000
    line.run(10.0, fps=20)
    assert line.run(60.0, fps=0).judged_per_s > 5  # lowered only while the last seconds of work are in view
    assert line.run(20.0, fps=20).judged_per_s == pytest.approx(20, rel=0.1)


def test_replicas_that_start_later_count_from_then_on():
    load, settled = Load(), 0
    for step in range(12):
        replicas = 1 if step < 6 else 3
        seen = load.add(NOW + step / 2, Backlog(10_000, 10_000, settled, 1.0), replicas)
        settled += 10 * (1 if step < 6 else 3)
    assert seen.judged_per_s == pytest.approx(20, rel=0.25)


def test_nothing_waits_since_the_last_frame():
    load = Load()
    assert load.add(NOW, Backlog(0, 0, 0, None), 1).idle_s == 0.0
    assert load.add(NOW + 4, Backlog(0, 0, 0, None), 1).idle_s == 4.0
    assert load.add(NOW + 5, Backlog(1, 0, 0, 0.1), 1).idle_s == 0.0
    assert load.add(NOW + 7, Backlog(0, 0, 1, None), 1).idle_s == 2.0


def test_a_server_that_lost_its_data_brings_no_negative_speed():
    load = Load()
    load.add(NOW, Backlog(1000, 1000, 500, 1.0), 1)
    assert load.add(NOW + 3, Backlog(940, 940, 560, 1.0), 1).judged_per_s == 20
    seen = load.add(NOW + 3.5, Backlog(100, 100, 0, 1.0), 1)
    assert (seen.arriving_per_s, seen.judged_per_s) == (0.0, 20)


@given(st.lists(st.tuples(st.floats(0.1, 5), st.integers(0, 500), st.integers(0, 500), st.integers(0, 9)), min_size=1))
def test_any_looks_give_sound_figures(steps):
    load, now, settled = Load(), NOW, 0
    for seconds, lag, judged, replicas in steps:
        now, settled = now + seconds, settled + judged
        seen = load.add(now, Backlog(lag, lag // 2, settled, None), replicas)
        assert seen.arriving_per_s >= 0
        assert seen.judged_per_s is None or (seen.judged_per_s > 0 and math.isfinite(seen.judged_per_s))
        assert 0 <= seen.idle_s <= now - NOW
