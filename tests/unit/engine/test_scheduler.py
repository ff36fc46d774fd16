"""What is done next, rule by rule, and in simulated days of work: nobody starves, nobody idles."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from keepwarm.core.prompt import Priority
from keepwarm.engine.scheduler import (
    PASSED_OVER_MAX,
    Abandon,
    Admit,
    Decode,
    Pace,
    Phase,
    Prefill,
    View,
    decide,
    rows_within,
)

PACE = Pace(rows_full=512, rows_delay=64)


def view(turn_id, phase, tenant="a", **more):
    return View(turn_id, tenant, Phase(phase), more.pop("priority", Priority.FOREGROUND), **more)


def idle(turn_id, phase, **more):
    return view(turn_id, phase, priority=Priority.IDLE, **more)


def next_of(*views, n_free=0, prefilled_last=False):
    return decide(views, n_free, PACE, prefilled_last=prefilled_last)


# --- admission


def test_nothing_to_do():
    assert next_of(n_free=8) is None
    assert next_of(view("1", "queued")) is None  # no stream
    assert next_of(view("1", "waiting"), n_free=8) is None


def test_first_come_first_served_within_a_tenant():
    assert next_of(view("1", "queued"), view("2", "queued"), n_free=1) == Admit("1")


def test_the_tenant_with_fewest_turns_on_streams_is_first():
    views = [
        view("1", "decode", "a"),
        view("2", "prefill", "a"),
        view("3", "decode", "b"),
        view("4", "queued", "a"),
        view("5", "queued", "b"),
        view("6", "queued", "c"),
        view("7", "queued", "c"),
    ]
    assert next_of(*views, n_free=1) == Admit("6")
    assert next_of(*views[:5], n_free=1) == Admit("5")


def test_a_turn_that_waits_for_anothers_prefix_is_on_no_stream():
    views = [view("1", "waiting", "a"), view("2", "queued", "a"), view("3", "queued", "b")]
    assert next_of(*views, n_free=1) == Admit("2")


# --- prefill and decode


def test_without_decoding_turns_a_chunk_is_a_whole_ubatch():
    assert next_of(view("1", "prefill", n_left=2000)) == Prefill("1", 512)


def test_beside_decoding_turns_a_chunk_is_one_that_delays_them_little():
    assert next_of(view("1", "decode"), view("2", "prefill", n_left=2000)) == Prefill("2", 64)


def test_decode_steps_and_prefill_chunks_alternate():
    views = view("1", "decode"), view("2", "prefill", n_left=9), view("3", "decode")
    assert next_of(*views, prefilled_last=False) == Prefill("2", 64)
    assert next_of(*views, prefilled_last=True) == Decode(("1", "3"))


def test_the_one_with_least_left_is_next_and_among_equals_the_first():
    assert next_of(view("1", "prefill", n_left=900), view("2", "prefill", n_left=20)) == Prefill("2", 512)
    assert next_of(view("1", "prefill", n_left=20), view("2", "prefill", n_left=20)) == Prefill("1", 512)


def test_one_passed_over_often_enough_goes_first():
    short = view("2", "prefill", n_left=20)
    almost = view("1", "prefill", n_left=900, passed_over=PASSED_OVER_MAX - 1)
    assert next_of(almost, short) == Prefill("2", 512)
    assert next_of(replace(almost, passed_over=PASSED_OVER_MAX), short) == Prefill("1", 512)


# --- idle work


def test_idle_work_runs_when_there_is_no_other():
    assert next_of(idle("1", "queued"), n_free=1) == Admit("1")
    assert next_of(idle("1", "prefill", n_left=9)) == Prefill("1", 512)
    assert next_of(idle("1", "decode")) == Decode(("1",))


@pytest.mark.parametrize("phase", ["queued", "waiting", "prefill", "decode"])
def test_idle_work_is_abandoned_as_soon_as_other_arrives(phase):
    views = [idle("1", "prefill", n_left=9), idle("2", "decode"), idle("3", "queued"), view("4", phase, n_left=1)]
    assert next_of(*views, n_free=1) == Abandon(("1", "2"))


def test_idle_work_that_holds_nothing_just_waits():
    assert next_of(idle("1", "queued"), view("2", "queued"), n_free=1) == Admit("2")
    assert next_of(idle("1", "queued"), view("2", "waiting"), n_free=1) is None


# --- any views

phases = st.sampled_from(Phase)
any_views = st.lists(
    st.builds(
        View,
        turn_id=st.integers(0, 10**9).map(str),
        tenant=st.sampled_from("abc"),
        phase=phases,
        priority=st.sampled_from(Priority),
        n_left=st.integers(0, 5000),
        passed_over=st.integers(0, 12),
    ),
    max_size=12,
    unique_by=lambda v: v.turn_id,
)


@given(any_views, st.integers(0, 8), st.booleans())
def test_any_action_fits_the_turns_it_names(views, n_free, prefilled_last):
    by_id = {v.turn_id: v for v in views}
    front = [v for v in views if v.priority is Priority.FOREGROUND]
    chosen_from = front or views
    action = decide(views, n_free, PACE, prefilled_last=prefilled_last)
    match action:
        case Admit(turn_id):
            assert n_free
            assert by_id[turn_id].phase is Phase.QUEUED
            assert by_id[turn_id] in chosen_from
        case Prefill(turn_id, rows_max):
            decoding = any(v.phase is Phase.DECODE for v in chosen_from)
            assert by_id[turn_id].phase is Phase.PREFILL
            assert by_id[turn_id] in chosen_from
            assert not (decoding and prefilled_last)
            assert rows_max == (PACE.rows_delay if decoding else PACE.rows_full)
        case Decode(turn_ids):
            assert turn_ids == tuple(v.turn_id for v in chosen_from if v.phase is Phase.DECODE)
            assert prefilled_last or not any(v.phase is Phase.PREFILL for v in chosen_from)
        case Abandon(turn_ids):
            assert front
            assert {by_id[t].priority for t in turn_ids} == {Priority.IDLE}
            assert {by_id[t].phase for t in turn_ids} <= {Phase.PREFILL, Phase.DECODE}
        case None:
            running = {Phase.PREFILL, Phase.DECODE} | ({Phase.QUEUED} if n_free else set())
            assert not any(v.phase in running for v in chosen_from)


# --- days of work


class Day:
    """Turns arrive, and what `decide` says is done to numbers: prompt tokens and answer tokens left."""

    def __init__(self, arrivals, n_streams):
        self.arrivals, self.n_streams = sorted(arrivals, key=lambda a: a[0]), n_streams
        self.views, self.n_out, self.arrived_at = {}, {}, {}
        self.prefilled_last = False
        self.ended, self.abandoned, self.actions = {}, set(), []

    def run(self, steps_max):
        step = 0
        while self.arrivals or self.views:
            assert step < steps_max, f"still there: {self.views}"
            while self.arrivals and (self.arrivals[0][0] <= step or not self.views):
                _, tenant, n_prompt, n_out, priority = self.arrivals.pop(0)
                turn_id = f"t{len(self.n_out)}"
                self.views[turn_id] = View(turn_id, tenant, Phase.QUEUED, priority, n_prompt)
                self.n_out[turn_id], self.arrived_at[turn_id] = n_out, step
            self.step(step)
            step += 1

    def step(self, at):
        on_streams = [v for v in self.views.values() if v.phase is not Phase.QUEUED]
        n_free = self.n_streams - len(on_streams)
        action = decide(list(self.views.values()), n_free, PACE, prefilled_last=self.prefilled_last)
        assert action is not None, "work was there and nothing was done"
        self.prefilled_last = isinstance(action, Prefill)
        self.actions.append(action)
        match action:
            case Admit(turn_id):
                self.views[turn_id] = replace(self.views[turn_id], phase=Phase.PREFILL)
            case Prefill(turn_id, rows_max):
                self.prefill(turn_id, rows_max, at)
            case Decode(turn_ids):
                for turn_id in turn_ids:
                    self.n_out[turn_id] -= 1
                    if self.n_out[turn_id] <= 0:
                        self.end(turn_id, at)
            case Abandon(turn_ids):
                for turn_id in turn_ids:
                    self.abandoned.add(turn_id)
                    self.end(turn_id, at)

    def prefill(self, turn_id, rows_max, at):
        for other in self.views.values():
            if other.phase is Phase.PREFILL:
                self.views[other.turn_id] = replace(other, passed_over=other.passed_over + 1)
                assert other.passed_over < PASSED_OVER_MAX + self.n_streams
        left = max(0, self.views[turn_id].n_left - rows_max)
        phase = Phase.PREFILL if left else Phase.DECODE
        self.views[turn_id] = replace(self.views[turn_id], n_left=left, phase=phase, passed_over=0)
        if not left and not self.n_out[turn_id]:
            self.end(turn_id, at)

    def end(self, turn_id, at):
        self.ended[turn_id] = at
        del self.views[turn_id]


turns = st.tuples(
    st.integers(0, 60),  # arrives at this step
    st.sampled_from("abc"),
    st.integers(1, 3000),
    st.integers(0, 20),
    st.sampled_from([Priority.FOREGROUND] * 4 + [Priority.IDLE]),
)


@given(st.lists(turns, min_size=1, max_size=25), st.integers(1, 8))
def test_every_turn_ends_and_only_idle_ones_are_abandoned(arrivals, n_streams):
    n_steps = sum(2 + n_prompt // PACE.rows_delay + 1 + n_out for _, _, n_prompt, n_out, _ in arrivals)
    day = Day(arrivals, n_streams)
    idle_ids = {f"t{i}" for i, a in enumerate(day.arrivals) if a[4] is Priority.IDLE}
    day.run(n_steps + 60)
    assert len(day.ended) == len(arrivals)
    assert day.abandoned <= idle_ids
    for before, after in pairwise(day.actions):
        if isinstance(before, Prefill) and isinstance(after, Prefill):
            assert after.rows_max == PACE.rows_full, "two chunks in a row while others decode"


def test_a_long_document_is_read_through_an_endless_line_of_short_questions():
    document = (0, "a", 512 * 20, 0, Priority.FOREGROUND)
    questions = [(i, "b", 10, 0, Priority.FOREGROUND) for i in range(1, 600)]
    day = Day([document, *questions], n_streams=4)
    day.run(3000)
    assert day.ended["t0"] < 600  # while questions still came


def test_a_short_question_does_not_wait_for_a_long_document():
    day = Day([(0, "a", 512 * 20, 0, Priority.FOREGROUND), (5, "b", 10, 0, Priority.FOREGROUND)], n_streams=4)
    day.run(100)
    assert day.ended["t1"] == 6  # admitted, then evaluated


def test_one_tenants_many_turns_do_not_keep_out_another():
    arrivals = [(0, "greedy", 500, 10, Priority.FOREGROUND)] * 20 + [(3, "modest", 500, 10, Priority.FOREGROUND)]
    day = Day(arrivals, n_streams=2)
    day.run(1000)
    assert sorted(day.ended, key=day.ended.get).index("t20") <= 2


# --- the measured pace


@pytest.mark.parametrize(
    "delay_ms, ms_per_row, expected",
    [
        (250.0, None, 32),  # careful before there is a measurement
        (250.0, 1.0, 250),
        (250.0, 0.1, 512),
        (250.0, 0.0, 512),
        (250.0, 1000.0, 2),
        (0.0, 1.0, 2),
    ],
)
def test_rows_within(delay_ms, ms_per_row, expected):
    assert rows_within(delay_ms, ms_per_row, 512) == expected


def test_a_small_ubatch_bounds_the_first_chunk():
    assert rows_within(250.0, None, 16) == 16
