"""Causes, names and numbers case by case; tests/property/test_miss_causes.py plants changes at random."""

from zlib import crc32

import numpy as np
import pytest
from msgspec.structs import replace

from keepwarm.cache.misses import Asked, Block, Facts, blocks_of, explain
from keepwarm.core.cache_lookup import CacheLookup, MissCause
from keepwarm.core.prompt import Tokens
from keepwarm.core.request import ChatRequest, Mark, Message, TextPart, Tool

TOOL = Tool("look", "looks", "{}")
SYSTEM = Message("system", (TextPart("be kind"),))
USER = Message("user", (TextPart("hello"),))
FACTS = Facts(end=2000, tokens_min=512, tier="host")


def asked(*parts: tuple[str, int], turn_id: str = "now", **fields: object) -> Asked:
    """Blocks by name and what is in them: n tokens each of which depends on block and content."""
    tokens = [np.full(1000, crc32(f"{name} {n}".encode()) % 30_000, np.int32) for name, n in parts]
    blocks = tuple(Block(name, f"{name} {n}".encode()) for name, n in parts)
    known = Asked(turn_id, "small", "t", np.concatenate(tokens), blocks, is_finished=True)
    return replace(known, **fields)


def shown(tokens: Tokens) -> str:
    return ",".join(map(str, tokens.tolist()))


def look(now: Asked, *recent: Asked, compare_with: str | None = None, **facts: object) -> CacheLookup:
    known = replace(FACTS, end=len(now.tokens))
    return explain(now, recent, replace(known, **facts), shown, compare_with=compare_with)


S, A, B, C = ("system", 0), ("messages[0]", 0), ("messages[1]", 0), ("messages[2]", 0)


def test_blocks_are_named_in_the_order_of_a_request() -> None:
    request = ChatRequest("m", (SYSTEM, SYSTEM, USER, SYSTEM), tools=(TOOL, TOOL))
    assert [block.name for block in blocks_of(request)] == [
        "tools[0]", "tools[1]", "system", "messages[0]", "messages[1]",
    ]  # fmt: skip
    assert [block.name for block in blocks_of(ChatRequest("m", (SYSTEM,)))] == ["system"]


def test_marks_and_the_cut_of_a_text_into_parts_change_no_block() -> None:
    mark = Mark(300)
    bare = ChatRequest("m", (SYSTEM, USER), tools=(TOOL,))
    parts = (TextPart("hel"), TextPart("lo", mark))
    marked = ChatRequest(
        "m", (replace(SYSTEM, mark=mark), replace(USER, parts=parts)), tools=(replace(TOOL, mark=mark),)
    )  # fmt: skip
    assert blocks_of(bare) == blocks_of(marked)
    assert blocks_of(bare) != blocks_of(replace(bare, messages=(SYSTEM, replace(USER, is_error=True))))


def test_a_first_prompt_is_first_seen_and_has_no_place() -> None:
    found = look(asked(S, A))
    assert found == CacheLookup("miss", 0, cause=MissCause.FIRST_SEEN)


def test_what_only_the_store_remembers_is_a_hit() -> None:
    """After a restart: the disk has the prefix, the history has nothing."""
    assert look(asked(S, A), n_found=1000, n_read=1000).outcome == "hit"
    assert look(asked(S, A), n_found=40, n_read=40).cause is MissCause.FIRST_SEEN  # the template's own beginning


def test_a_prompt_less_like_this_one_than_what_was_read_is_not_compared() -> None:
    found = look(asked(S, A, B), asked(("system", 1), A, turn_id="t1"), n_found=1000, n_read=1000)
    assert (found.outcome, found.compared_with) == ("hit", None)


def test_stored_and_not_read_is_slower_even_when_nobody_remembers_it() -> None:
    found = look(asked(S, A), n_found=1000, n_read=0)
    assert (found.outcome, found.cause, found.n_missed) == ("miss", MissCause.SLOWER_THAN_RECOMPUTING, 1000)


def test_a_conversation_that_goes_on_is_a_hit_with_much_new_text() -> None:
    found = look(asked(S, A, B, C), asked(S, A, turn_id="t1"), n_found=2000, n_read=1990)
    assert found == CacheLookup("hit", 1990, "host", compared_with="t1")


def test_a_conversation_that_goes_on_and_was_evicted_is_not_one_that_changed() -> None:
    found = look(asked(S, A, B, C), asked(S, A, turn_id="t1"))
    assert (found.cause, found.n_missed) == (MissCause.EVICTED, 2000)
    assert found.place is not None
    assert (found.place.block, found.place.n_shared) == ("messages[1]", 2000)


def test_a_turn_that_is_running_and_one_that_is_stored() -> None:
    running = asked(S, A, turn_id="t2", is_finished=False)
    assert look(asked(S, A), running).cause is MissCause.STILL_BEING_WRITTEN
    assert look(asked(S, A), running, asked(S, A, turn_id="t1")).cause is MissCause.EVICTED
    assert look(asked(S, A), running, n_read=1990, n_found=1990).outcome == "hit"  # it waited for the other


def test_an_earlier_prompt_too_short_to_be_stored_was_not_evicted() -> None:
    short = asked(S, turn_id="t1", is_cached=False)
    found = look(asked(S, A), short, tokens_min=1500)
    assert (found.cause, found.n_missed) == (MissCause.BELOW_MINIMUM, 1000)


def test_other_models_prompts_are_no_promise() -> None:
    there = asked(S, A, turn_id="t1", model="large")
    found = look(asked(S, A), there)
    assert (found.cause, found.n_missed) == (MissCause.MODEL_CHANGED, 2000)
    both = look(asked(S, A), there, asked(S, A, turn_id="t0"), n_found=1990, n_read=1990)
    assert (both.outcome, both.compared_with) == ("hit", "t0")


def test_equal_blocks_that_became_other_text_are_the_templates_doing() -> None:
    there = asked(S, A, turn_id="t1")
    now = replace(there, turn_id="now", tokens=np.concatenate([there.tokens[:100], there.tokens[1000:], there.tokens]))
    found = look(now, there, n_found=100, n_read=100)
    assert (found.cause, found.outcome) == (MissCause.TEMPLATE_CHANGED, "partial")


def test_tokens_decide_and_blocks_only_name() -> None:
    """A partial answer that was completed: another message, the same beginning."""
    there = asked(S, A, turn_id="t1")
    now = replace(asked(S, A, B), blocks=(there.blocks[0], Block("messages[0]", b"longer"), Block("messages[1]", b"")))
    assert look(now, there, n_found=1990, n_read=1990).outcome == "hit"


@pytest.mark.parametrize(
    "then, now, cause, block",
    [
        ([("tools[0]", 0), S, A], [("tools[0]", 1), S, A], MissCause.TOOLS_CHANGED, "tools[0]"),
        ([("tools[0]", 0), S, A], [S, A], MissCause.TOOLS_CHANGED, "tools[0]"),
        ([S, A], [("tools[0]", 0), S, A], MissCause.TOOLS_CHANGED, "tools[0]"),
        ([S, A, B], [A, B], MissCause.SYSTEM_CHANGED, "system"),
        ([A, B], [("system", 1), A, B], MissCause.SYSTEM_CHANGED, "system"),
        ([S, A, B], [S, ("messages[0]", 1), B], MissCause.MESSAGES_CHANGED, "messages[0]"),
        ([S, A, B], [S, A, ("messages[1]", 1), C], MissCause.MESSAGES_CHANGED, "messages[1]"),
    ],
)
def test_the_first_block_that_differs_is_named(
    then: list[tuple[str, int]], now: list[tuple[str, int]], cause: MissCause, block: str
) -> None:
    n = next((i for i, (here, there) in enumerate(zip(now, then, strict=False)) if here != there), 0) * 1000
    found = look(asked(*now), asked(*then, turn_id="t1"), n_found=n, n_read=n)
    assert found.cause is cause
    assert found.place is not None
    assert (found.place.block, found.place.n_shared) == (block, n)
    assert found.n_missed == min(len(then), len(now)) * 1000 - n


def test_the_same_conversation_explains_more_than_another_one_with_the_new_beginning() -> None:
    mine = asked(S, *((f"messages[{i}]", 0) for i in range(40)), turn_id="mine")
    other = asked(("system", 1), ("messages[0]", 7), turn_id="other")
    now = asked(("system", 1), *((f"messages[{i}]", 0) for i in range(41)))
    found = look(now, other, mine, n_found=1000, n_read=1000)
    assert (found.cause, found.compared_with, found.outcome) == (MissCause.SYSTEM_CHANGED, "mine", "partial")


def test_a_named_turn_is_compared_with_whatever_is_nearer() -> None:
    near, named = asked(S, A, turn_id="near"), asked(S, ("messages[0]", 1), turn_id="named")
    found = look(asked(S, A, B), near, named, n_found=1990, n_read=1990, compare_with="named")
    assert (found.compared_with, found.compare_found) == ("named", True)
    unknown = look(asked(S, A, B), near, n_found=1990, n_read=1990, compare_with="gone")
    assert (unknown.compared_with, unknown.compare_found) == ("near", False)


# Breakpoints: what may be read is what was marked, not what is shared.


def test_a_marked_prefix_in_full_is_a_hit_whatever_follows_it() -> None:
    there = asked(S, ("messages[0]", 1), turn_id="t1")
    found = look(asked(S, A), there, end=1000, n_promised=1000, n_found=1000, n_read=1000, is_automatic=False)
    assert (found.outcome, found.cause) == ("hit", None)


def test_shared_text_that_nobody_marked_was_not_evicted() -> None:
    there = asked(S, A, B, turn_id="t1")
    known = {"n_promised": 1000, "n_found": 1000, "n_read": 1000, "is_automatic": False}
    assert look(asked(S, A, B, C), there, end=4000, **known).outcome == "hit"
    first_mark = look(asked(S, A, B, C), there, end=4000, is_automatic=False)
    assert (first_mark.outcome, first_mark.cause) == ("miss", MissCause.FIRST_SEEN)


def test_a_promise_that_the_store_did_not_keep_is_evicted() -> None:
    found = look(asked(S, A), end=2000, n_promised=1000, is_automatic=False)
    assert (found.cause, found.n_missed) == (MissCause.EVICTED, 1000)


def test_expired_and_too_far() -> None:
    there = asked(S, A, B, turn_id="t1")
    expired = look(
        asked(S, A, B), there, n_expired=3000, n_promised=1000, n_found=1000, n_read=1000, is_automatic=False
    )
    assert (expired.cause, expired.outcome, expired.n_missed) == (MissCause.EXPIRED, "partial", 2000)
    far = look(asked(S, A, B, C), there, n_too_far=3000, is_automatic=False)
    assert (far.cause, far.n_missed) == (MissCause.MESSAGES_CHANGED, 3000)
    assert far.place is not None
    assert far.place.block == "messages[2]"


def test_breakpoints_that_are_all_too_short() -> None:
    assert look(asked(S, A), end=0, is_automatic=False).cause is MissCause.BELOW_MINIMUM


# Cache objects.


def test_an_object_that_is_not_ready_or_not_there() -> None:
    assert look(asked(S, A), n_promised=1000, is_pending=True).cause is MissCause.STILL_BEING_WRITTEN
    assert look(asked(S, A), n_promised=1000).cause is MissCause.EVICTED
    assert look(asked(S, A), n_promised=1000, lost=MissCause.EXPIRED).cause is MissCause.EXPIRED
    assert look(asked(S, A), lost=MissCause.DELETED).cause is MissCause.DELETED
    assert look(asked(S, A), asked(S, A, turn_id="t1"), lost=MissCause.DELETED).cause is MissCause.DELETED


def test_an_object_that_is_gone_is_no_loss_while_its_text_is_still_read() -> None:
    assert look(asked(S, A), lost=MissCause.DELETED, n_found=1990, n_read=1990).outcome == "hit"


# What is said besides.


def test_the_texts_around_the_place_are_of_both_prompts() -> None:
    now, there = asked(S, A), asked(S, ("messages[0]", 1), turn_id="t1")
    place = look(now, there, n_found=1000, n_read=1000).place
    assert place is not None
    assert (place.before, place.here, place.there) == (
        shown(now.tokens[988:1000]), shown(now.tokens[1000:1012]), shown(there.tokens[1000:1012]),
    )  # fmt: skip


def test_nothing_is_decoded_for_a_hit() -> None:
    def never(_tokens: Tokens) -> str:
        raise AssertionError

    now, there = asked(S, A, B), asked(S, A, turn_id="t1")
    assert explain(now, [there], replace(FACTS, end=3000, n_read=1990), never).outcome == "hit"


def test_small_minimums_do_not_make_everything_a_hit() -> None:
    """With a minimum of a few tokens the slack is less, too."""
    short = replace(asked(S), tokens=np.arange(60, dtype=np.int32))
    assert look(short, tokens_min=16).cause is MissCause.FIRST_SEEN
    assert look(short, tokens_min=16, n_found=58, n_read=58).outcome == "hit"


def test_the_worst_place_for_a_granularity_of_64_is_still_a_hit() -> None:
    """Of 1,025 tokens the last two are evaluated, and 1,023 are cut to 960."""
    now = replace(asked(S), tokens=np.arange(1025, dtype=np.int32))
    there = replace(now, turn_id="t1")
    assert look(now, there, n_found=960, n_read=960).outcome == "hit"
    goes_on = replace(now, tokens=np.arange(2000, dtype=np.int32))
    assert look(goes_on, there, n_found=1024, n_read=960).outcome == "hit"
