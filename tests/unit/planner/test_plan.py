"""Rows of a plan over conversations that are known by heart."""

import pytest

from keepwarm.billing.price_book import shipped_prices
from keepwarm.billing.sheet_file import shipped_drafts
from keepwarm.planner.plan import PLACES_MAX, SCHEMES, marked_places, planned, shown_ttl
from keepwarm.planner.prices import Catalogue
from keepwarm.planner.traffic import Prompt, Spot, Traffic

NOW = 1_780_000_000  # in May 2026
CATALOGUE = Catalogue(shipped_drafts(), NOW)


def conversations(wait_s: float, n_output: int | None = 5) -> Traffic:
    """Six users with three turns each, a minute apart, the next user `wait_s` later; 2,000 tokens of system text."""
    prompts, now = [], 0.0
    for user in range(6):
        for turn in range(3):
            ends = (2000, *(3000 + 1000 * k for k in range(turn + 1)))
            spots = tuple(Spot(-1 if end == 2000 else 10_000 * user + end, end, k) for k, end in enumerate(ends))
            places = {"system": 0, "last message": len(ends) - 1}
            prompts.append(Prompt(now, ends[-1] + 10, (), spots, places, n_output))
            now += 60
        now += wait_s
    return Traffic("made", 64, tuple(prompts))


def rows_of(traffic: Traffic, name: str):
    schemes = [scheme for scheme in SCHEMES if scheme.name == name]
    made = planned(traffic, schemes, {name: CATALOGUE.shown(schemes[0].prices)})
    return {row.ttl: row for row in made.rows}, made


def test_users_who_come_every_half_hour_want_the_system_text_for_an_hour_and_the_rest_for_minutes():
    rows, made = rows_of(conversations(wait_s=1800), "anthropic")
    mixed = rows["1h, last 5m"]
    assert set(mixed.places) == {"system", "last message"}
    assert mixed.total_nano == min(row.total_nano for row in rows.values())
    # Written for an hour: the system text once, at 2 times 0.30 a million; for minutes: 1,000 tokens of each turn, at 1.25.
    assert mixed.write_nano == 2000 * 600 + 6 * 3 * 1000 * 375
    assert mixed.n_read_tokens == 6 * (2000 + 3000 + 4000) - 2000
    gains = [mark.gain_nano for mark in made.marks if mark.ttl == "1h, last 5m" and mark.gain_nano is not None]
    assert sum(gains) == mixed.saving_nano


def test_an_object_of_the_system_text_is_read_by_all_who_come_in_time():
    rows, _ = rows_of(conversations(wait_s=0), "gemini")
    row = rows["5m"]
    assert (row.places, row.n_objects, row.n_read_tokens) == (("system",), 1, 18 * 2000)
    assert row.creation_nano == 2000 * 300
    assert row.storage_nano == round(2000 * 1000 * (17 * 60 + 300) / 3600)


@pytest.mark.parametrize("n_output, output_nano", [(5, 18 * 5 * 1200), (None, None)])
def test_answers_are_paid_or_left_out_everywhere(n_output, output_nano):
    rows, _ = rows_of(conversations(0, n_output), "openai")
    for row in rows.values():
        assert row.output_nano == output_nano
        known = row.fresh_nano + row.read_nano + row.write_nano + (output_nano or 0)
        assert row.total_nano == known
    assert rows["none"].none_nano == rows["none"].total_nano


def test_one_answer_of_unknown_length_leaves_all_out():
    traffic = conversations(0)
    last = traffic.prompts[-1]
    unknown = Prompt(last.at_s, last.n_tokens, (), last.spots, last.places, None)
    rows, _ = rows_of(Traffic("made", 64, (*traffic.prompts[:-1], unknown)), "openai")
    assert {row.output_nano for row in rows.values()} == {None}


def test_the_end_is_among_the_places_however_many_there_are():
    places = {f"message {k}": k for k in range(30)} | {"last message": 29}
    spots = tuple(Spot(k, k + 1) for k in range(30))
    found = marked_places(Traffic("made", 64, (Prompt(0, 30, (), spots, places),)))
    assert (len(found), found[0], found[-1]) == (PLACES_MAX, "message 0", "last message")


def test_lifetimes_are_written_short():
    assert [shown_ttl(ttl_s) for ttl_s in (300, 3600, 1800, 90)] == ["5m", "1h", "30m", "90s"]


def test_the_base_has_the_prices_that_the_numbers_above_are_of():
    [rates] = shipped_prices("minimax-international@2026", "MiniMax-M2.1").tiers
    assert (rates.input, rates.output) == (300_000_000, 1_200_000_000)
