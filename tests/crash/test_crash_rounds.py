"""Ten rounds of the kill harness; two hundred are run by hand, with `make crash` (docs/testing.md)."""

import itertools

import pytest

from keepwarm.core.clock import SystemClock
from tests.crash.plan import Act, Victim, plan_round
from tests.crash.rounds import opened

SEED = 20_251
N_ROUNDS = 10


@pytest.mark.e2e
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_what_was_acknowledged_survives_a_kill_at_any_moment(tmp_path):
    with opened(SEED, tmp_path, SystemClock()) as run:
        reports = [run.round(number) for number in range(N_ROUNDS)]
    assert sum(report.n_ready for report in reports) > 0, "no round had anything to lose"
    assert sum(report.n_unanswered for report in reports) > 0, "no call was under way at any kill"


def test_a_round_is_its_seed_and_number():
    assert plan_round(1, 2) == plan_round(1, 2)
    assert plan_round(1, 2) != plan_round(1, 3) and plan_round(1, 2) != plan_round(2, 2)


def test_rounds_differ_in_everything_a_kill_can_meet():
    plans = [plan_round(SEED, number) for number in range(200)]
    assert {plan.victim for plan in plans} == set(Victim)
    acts = itertools.chain.from_iterable(itertools.chain.from_iterable(plan.clients) for plan in plans)
    assert {operation.act for operation in acts} == set(Act)
    assert any(plan.again_s is not None for plan in plans) and any(plan.again_s is None for plan in plans)
