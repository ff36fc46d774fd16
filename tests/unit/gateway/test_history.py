"""What is remembered of prompts and turns, for how many, and for whom."""

import numpy as np
from msgspec.structs import replace

from keepwarm.cache.misses import Asked, Block, Facts
from keepwarm.core.cache_lookup import MissCause
from keepwarm.core.prompt import Tokens
from keepwarm.gateway.history import (
    ASKED_BYTES,
    BLOCK_BYTES,
    PROMPTS_PER_TENANT_MAX,
    RECORDS_MAX,
    History,
    TurnRecord,
)

FACTS = Facts(end=1000, tokens_min=512)


def shown(tokens: Tokens) -> str:
    return ",".join(map(str, tokens.tolist()))


def asked(turn_id: str, *, n_tokens: int = 1000, first: int = 0) -> Asked:
    tokens = np.arange(first, first + n_tokens, dtype=np.int32)
    return Asked(turn_id, "small", "t", tokens, (Block("messages[0]", b"%d" % first),), is_finished=True)


def test_a_prompt_is_explained_by_the_tenants_own_earlier_one() -> None:
    history = History(shown)
    history.asked("a", asked("t1"))
    history.asked("a", asked("t2"))
    found = history.look("a", asked("t2"), FACTS, None)
    assert (found.cause, found.compared_with) == (MissCause.EVICTED, "t1")


def test_another_tenants_prompts_are_neither_compared_nor_named_nor_shown() -> None:
    history = History(shown)
    history.asked("a", asked("t1"))
    found = history.look("b", replace(asked("t2"), tokens=np.arange(5, 1005, dtype=np.int32)), FACTS, "t1")
    assert (found.cause, found.compared_with, found.place) == (MissCause.FIRST_SEEN, None, None)
    assert found.compare_found is False


def test_equal_turn_ids_of_two_tenants_are_two_turns() -> None:
    history = History(shown)
    history.asked("a", asked("t1", first=0))
    history.asked("b", asked("t1", first=7))
    assert history.look("a", asked("now"), FACTS, None).compared_with == "t1"
    assert history.look("b", asked("now"), FACTS, None).cause is MissCause.FIRST_SEEN
    history.record("a", record("t1"))
    assert history.turn("b", "t1") is None
    assert history.turn("a", "t1") == record("t1")


def test_a_turn_that_failed_explains_nothing() -> None:
    history = History(shown)
    history.asked("a", asked("t1"))
    history.forget("a", "t1")
    history.forget("a", "t1")
    assert history.look("a", asked("t2"), FACTS, None).cause is MissCause.FIRST_SEEN
    assert history.n_bytes == 0


def test_a_finished_prompt_takes_the_place_of_the_running_one() -> None:
    history = History(shown)
    history.asked("a", replace(asked("t1"), is_finished=False))
    once = history.n_bytes
    assert history.look("a", asked("t2"), FACTS, None).cause is MissCause.STILL_BEING_WRITTEN
    history.asked("a", asked("t1"))
    assert history.n_bytes == once == 4000 + BLOCK_BYTES + ASKED_BYTES
    assert history.look("a", asked("t2"), FACTS, None).cause is MissCause.EVICTED


def test_a_tenants_oldest_prompts_leave_and_no_other_tenants() -> None:
    history = History(shown)
    history.asked("quiet", asked("q"))
    for n in range(PROMPTS_PER_TENANT_MAX + 1):
        history.asked("busy", asked(f"t{n}", first=n * 1000))
    assert history.look("quiet", asked("now"), FACTS, None).compared_with == "q"
    assert history.look("busy", asked("now", first=0), FACTS, None).cause is MissCause.FIRST_SEEN
    assert history.look("busy", asked("now", first=1000), FACTS, None).compared_with == "t1"


def test_bytes_are_bounded_over_all_tenants_and_the_oldest_leave_first() -> None:
    one = 4000 + BLOCK_BYTES + ASKED_BYTES
    history = History(shown, bytes_max=3 * one)
    for tenant in "abcd":
        history.asked(tenant, asked("t1"))
    assert history.n_bytes == 3 * one
    assert history.look("a", asked("now"), FACTS, None).cause is MissCause.FIRST_SEEN
    assert history.look("b", asked("now"), FACTS, None).compared_with == "t1"
    history.asked("b", asked("huge", n_tokens=100_000))
    assert history.n_bytes == one - 4000 + 400_000  # one prompt above the bound stays, alone
    assert history.look("d", asked("now"), FACTS, None).cause is MissCause.FIRST_SEEN


def test_records_are_bounded() -> None:
    history = History(shown)
    for n in range(RECORDS_MAX + 1):
        history.record("a", record(f"t{n}"))
    assert history.turn("a", "t0") is None
    assert history.turn("a", "t1") is not None


def record(turn_id: str) -> TurnRecord:
    return TurnRecord(turn_id, "openai", "small", 0.0, "running")
