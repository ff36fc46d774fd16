"""Bodies as prompts: places are where the prefix ends, whatever follows, and the client's own marks change nothing."""

import json

import pytest

from keepwarm.config import Limits
from keepwarm.core.errors import ApiError
from keepwarm.engine.scripted import ScriptedVocab
from keepwarm.planner.bodies import Bodies
from keepwarm.planner.numbers import BLOCK_TOKENS

SYSTEM = "You answer in one word. " * 20
TOOL = {"name": "look_up", "description": "Looks it up.", "input_schema": {"type": "object", "properties": {}}}


@pytest.fixture
def bodies():
    return Bodies(ScriptedVocab(), Limits())


def openai(*messages):
    return json.dumps({"model": "m", "messages": [{"role": r, "content": c} for r, c in messages]}).encode()


def anthropic(*messages, **members):
    body = {"model": "m", "max_tokens": 9, "messages": [{"role": r, "content": c} for r, c in messages], **members}
    return json.dumps(body).encode()


def test_a_conversations_last_message_is_a_place_of_its_next_turn(bodies):
    first = bodies.rendered("openai", openai(("system", SYSTEM), ("user", "One?")))
    second = bodies.rendered(
        "openai", openai(("system", SYSTEM), ("user", "One?"), ("assistant", "Yes."), ("user", "Two?"))
    )
    end = first.spots[first.places["last message"]]
    assert end in second.spots
    assert second.spots[second.places["message 1"]] == end
    assert first.spots[first.places["system"]] == second.spots[second.places["system"]]
    assert second.places["last message"] == second.places["message 3"] == len(second.spots) - 1
    assert [spot.end for spot in second.spots] == sorted({spot.end for spot in second.spots})


def test_the_system_text_ends_where_other_questions_part(bodies):
    one, other = (
        bodies.rendered("openai", openai(("system", SYSTEM), ("user", text))) for text in ("Is it A?", "Is it B?")
    )
    system = one.spots[one.places["system"]]
    assert system == other.spots[other.places["system"]]
    assert system.end > len(SYSTEM.rstrip())  # control tokens are before it
    assert one.spots[-1].key != other.spots[-1].key
    different = bodies.rendered("openai", openai(("system", "Other. " + SYSTEM), ("user", "A")))
    assert different.spots[different.places["system"]].key != system.key


def test_both_dialects_give_the_same_prompt(bodies):
    assert bodies.rendered("openai", openai(("system", SYSTEM), ("user", "A"))) == bodies.rendered(
        "anthropic", anthropic(("user", "A"), system=SYSTEM)
    )


def test_tools_are_a_place_and_other_tools_another_prefix(bodies):
    one = bodies.rendered("anthropic", anthropic(("user", "A"), tools=[TOOL]))
    same = bodies.rendered("anthropic", anthropic(("user", "B"), tools=[TOOL]))
    assert one.spots[one.places["tools"]] == same.spots[same.places["tools"]]
    other = bodies.rendered("anthropic", anthropic(("user", "A"), tools=[{**TOOL, "name": "other"}]))
    assert other.spots[other.places["tools"]].key != one.spots[one.places["tools"]].key


def test_the_clients_own_marks_change_nothing(bodies):
    texts = [{"type": "text", "text": "Some of the text. "}, {"type": "text", "text": "The rest of it."}]
    marked = [{**texts[0], "cache_control": {"type": "ephemeral"}}, texts[1]]
    plain = bodies.rendered("anthropic", anthropic(("user", texts), system=SYSTEM))
    assert bodies.rendered("anthropic", anthropic(("user", marked), system=SYSTEM)) == plain


def test_blocks_are_whole_and_shared_as_far_as_the_texts_are(bodies):
    one, other = (bodies.rendered("openai", openai(("system", SYSTEM), ("user", text))) for text in ("A", "B" * 200))
    assert len(one.blocks) == one.n_tokens // BLOCK_TOKENS
    n_same = sum(left == right for left, right in zip(one.blocks, other.blocks, strict=False))
    assert one.blocks[:n_same] == other.blocks[:n_same]
    assert n_same >= one.spots[one.places["system"]].end // BLOCK_TOKENS


def test_long_conversations_keep_their_first_and_their_latest_places(bodies):
    messages = [("user" if k % 2 == 0 else "assistant", f"{k}") for k in range(151)]
    found = bodies.rendered("openai", openai(("system", SYSTEM), *messages))
    assert {"system", "message 1", "last message"} <= set(found.places)
    before = bodies.rendered("openai", openai(("system", SYSTEM), *messages[:-2]))
    assert before.spots[before.places["last message"]] in found.spots


def test_a_body_that_the_server_refuses_is_refused(bodies):
    with pytest.raises(ApiError, match="messages"):
        bodies.rendered("openai", b'{"model": "m"}')
