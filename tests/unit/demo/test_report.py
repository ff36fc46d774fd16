import pytest
from rich.console import Console

from keepwarm.demo.client import Answer
from keepwarm.demo.report import Call, Keeping, keeping_line, last_line, reduction, table

UNCACHED = Call("without a cache", Answer("a", 5_000, 0, 50, 16_000.0))
CACHED = Call("cached", Answer("a", 5_000, 4_950, 50, 160.0), n_object=4_950, is_equal=True)


def shown(calls: list[Call]) -> list[list[str]]:
    console = Console(width=160)
    with console.capture() as capture:
        console.print(table(calls))
    return [[cell.strip() for cell in line.split("│")[1:-1]] for line in capture.get().splitlines() if "│" in line]


def test_what_calls_cost() -> None:
    assert UNCACHED.without_nano == 5_050 * 12_000
    assert CACHED.without_nano == 5_050 * 12_000
    assert CACHED.with_nano == 20_000_000 + 100 * 12_000


def test_tokens_reused_beyond_the_object_are_not_free_on_this_sheet() -> None:
    call = Call("cached", Answer("a", 5_000, 4_998, 50, 1.0), n_object=4_950)
    assert call.with_nano == CACHED.with_nano


def test_an_object_that_was_not_used_costs_no_fee() -> None:
    missed = Call("cached", Answer("a", 5_000, 0, 50, 1.0), n_object=4_950)
    assert missed.with_nano == missed.without_nano


def test_the_table_has_a_row_per_call() -> None:
    different = Call("[other]", CACHED.answer, n_object=4_950, is_equal=False)
    assert shown([UNCACHED, CACHED, different]) == [
        ["without a cache", "5,000", "0", "16,000", "", "0.0606", ""],
        ["cached", "5,000", "4,950", "160", "0.0212", "0.0606", "yes"],
        ["[other]", "5,000", "4,950", "160", "0.0212", "0.0606", "NO"],
    ]


def test_the_last_line_compares_the_median_of_the_warm_calls_with_the_cold_one() -> None:
    slow = Call("cached", Answer("b", 5_000, 4_950, 50, 9_000.0), n_object=4_950)
    assert last_line([UNCACHED, CACHED, slow, CACHED]) == (
        "Warm calls against uncached: time to first token −99.0 % (16,000 → 160 ms), "
        "cost of a call −65.0 % (¥0.0606 → ¥0.0212)"
    )


def test_the_object_itself_is_told_beside_the_calls() -> None:
    assert keeping_line([UNCACHED, CACHED, CACHED], Keeping(n_tokens=5_000, lived_s=61)) == (
        "On top: creation ¥0.1200 once, storage ¥0.1000 for the 61 s the object was kept (begun minutes count in full). "
        "The 2 calls with all of it: ¥0.2624, without a cache: ¥0.1212."
    )


@pytest.mark.parametrize("before, after, text", [(100, 1, "−99.0 %"), (100, 100, "−0.0 %"), (100, 150, "+50.0 %")])
def test_reductions_have_their_sign(before: float, after: float, text: str) -> None:
    assert reduction(before, after) == text
