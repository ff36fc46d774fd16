import json

import pytest

from keepwarm.bench.agent_session import Session, Size


def n_bytes(text: str) -> int:
    return len(text.encode())


def n_words(text: str) -> int:
    return len(text) // 4


def session(seed: int = 1, n_turns: int = 12, **size) -> Session:
    return Session(seed, Size(n_turns=n_turns, **size), n_words)


def body(made: Session, number: int) -> dict:
    return json.loads(made.body(number, 8))


def marks(value: object) -> list[dict]:
    """All cache_control members, in the order of the prompt's parts."""
    if isinstance(value, list):
        return [mark for one in value for mark in marks(one)]
    if isinstance(value, dict):
        return (
            [value["cache_control"]] if "cache_control" in value else [m for one in value.values() for m in marks(one)]
        )
    return []


def unmarked(value: object) -> object:
    if isinstance(value, list):
        return [unmarked(one) for one in value]
    if isinstance(value, dict):
        return {name: unmarked(one) for name, one in value.items() if name != "cache_control"}
    return value


def test_the_same_seed_is_the_same_session_and_no_other_is() -> None:
    assert session(1).body(7, 8) == session(1).body(7, 8)
    assert session(1).body(7, 8) != session(2).body(7, 8)


def test_every_turn_begins_with_the_whole_turn_before() -> None:
    made = session()
    for number in range(2, 13):
        before, after = body(made, number - 1), body(made, number)
        assert (after["tools"], after["system"]) == (before["tools"], before["system"])
        n_messages = len(before["messages"])
        assert unmarked(after["messages"][:n_messages]) == unmarked(before["messages"])
        assert [message["role"] for message in after["messages"][n_messages:]] == ["assistant", "user"]


@pytest.mark.parametrize("number", [1, 2, 6])
def test_breakpoints_are_where_agents_put_them_the_longer_first(number: int) -> None:
    asked = body(session(), number)
    assert marks([asked["tools"], asked["system"], asked["messages"]]) == [
        {"type": "ephemeral", "ttl": "1h"},
        {"type": "ephemeral", "ttl": "1h"},
        {"type": "ephemeral"},
    ]
    assert "cache_control" in asked["tools"][-1]
    assert "cache_control" in asked["system"][-1]
    assert "cache_control" in asked["messages"][-1]["content"][-1]


def test_every_call_is_of_a_declared_tool_and_has_its_result() -> None:
    asked = body(session(), 12)
    needed = {tool["name"]: set(tool["input_schema"]["required"]) for tool in asked["tools"]}
    n_calls = []
    for said, answered in zip(asked["messages"][1::2], asked["messages"][2::2], strict=True):
        calls = [block for block in said["content"] if block["type"] == "tool_use"]
        assert all(set(call["input"]) == needed[call["name"]] for call in calls)
        assert [call["id"] for call in calls] == [block["tool_use_id"] for block in answered["content"]]
        assert all(block["content"][0]["text"] for block in answered["content"])
        n_calls.append(len(calls))
    assert set(n_calls) == {1, 2}
    ids = [block["id"] for said in asked["messages"][1::2] for block in said["content"] if block["type"] == "tool_use"]
    assert len(ids) == len(set(ids))


def test_lengths_are_about_those_asked_for() -> None:
    asked = body(session(base_tokens=3000, task_tokens=500), 1)
    base = n_words(json.dumps(asked["tools"])) + n_words(json.dumps(asked["system"]))
    assert 2900 < base < 3200
    assert 480 < n_words(asked["messages"][0]["content"][0]["text"]) < 560


def test_texts_longer_than_asked_for_are_not_cut() -> None:
    asked = json.loads(Session(1, Size(n_turns=2, base_tokens=1, task_tokens=1), n_bytes).body(2, 8))
    assert "How to work" in asked["system"][1]["text"]
    assert len(asked["messages"]) == 3
