"""What a client of the Anthropic SDK does, one function a subject: `python anthropic_calls.py URL KEY SUBJECT`.

A program of its own, since two versions of the SDK cannot be in one process: the suite runs it with each of them. It uses
what both have; members that only the newer knows go through `extra_body`. Nothing but the SDK is imported. Ends with 0, or
with a failed assertion.
"""

import random
import sys

import anthropic

MODEL = "claude-sonnet-4-5"
GREEDY = {"temperature": 0}
PHRASE = "the harbour keeps its lights burning while small boats carry grain and letters across cold grey water"
WORDS = PHRASE.split()
TOOL = {
    "name": "get_weather",
    "description": "The weather in a city.",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 20}},
        "required": ["city"],
        "additionalProperties": False,
    },
}
SHORT, LONG = {"type": "ephemeral"}, {"type": "ephemeral", "ttl": "1h"}


def text(seed, n_words=700):
    """Always the same for a seed, and for no other."""
    choice = random.Random(seed)
    return f"Text number {seed}. " + " ".join(choice.choice(WORDS) for _ in range(n_words)) + "."


def block(content, mark=None):
    return {"type": "text", "text": content} | ({"cache_control": mark} if mark else {})


def user(content):
    return {"role": "user", "content": content}


def ask(client, messages, **more):
    extra = GREEDY | more.pop("extra_body", {})
    return client.messages.create(**{"model": MODEL, "max_tokens": 10, "messages": messages} | more, extra_body=extra)


def counts(message):
    usage = message.usage
    return usage.cache_creation_input_tokens, usage.cache_read_input_tokens, usage.input_tokens


def total(message):
    return sum(counts(message))


def said(message):
    return "".join(part.text for part in message.content if part.type == "text")


def plain(client):
    message = ask(client, [user("Say hello.")], system="Be brief.")
    assert (message.type, message.role, message.model) == ("message", "assistant", MODEL)
    assert message.id.startswith("msg_") and message._request_id
    assert said(message)
    assert message.stop_reason in ("end_turn", "max_tokens") and message.stop_sequence is None
    assert 0 < message.usage.output_tokens <= 10
    assert ask(client, [user([block("Say "), block("hello.")])], system=[block("Be brief.")]).content == message.content


def stops(client):
    whole = said(ask(client, [user("Count: one, two, three, four.")], max_tokens=12))
    word = whole.split()[1]
    stopped = ask(client, [user("Count: one, two, three, four.")], max_tokens=12, stop_sequences=[word])
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", word)
    assert word not in said(stopped)
    cut = ask(client, [user(text(1, 1500))], max_tokens=32_000, stop_sequences=["harbour"])
    assert cut.stop_reason in ("end_turn", "stop_sequence", "model_context_window_exceeded")
    prefilled = ask(client, [user("Greet me."), {"role": "assistant", "content": "Good"}])
    assert said(prefilled) and not said(prefilled).startswith("Good")


def streamed(client):
    messages = [user("Tell me about the sea.")]
    whole = ask(client, messages, max_tokens=20)
    with client.messages.stream(model=MODEL, max_tokens=20, messages=messages, extra_body=GREEDY) as stream:
        seen = [event.type for event in stream]
        final = stream.get_final_message()
    assert said(final) == said(whole)
    assert final.stop_reason == whole.stop_reason
    assert total(final) == total(whole) and final.usage.output_tokens == whole.usage.output_tokens
    assert seen[0] == "message_start" and seen[-1] == "message_stop"
    raw = client.messages.create(model=MODEL, max_tokens=20, messages=messages, stream=True, extra_body=GREEDY)
    kinds = [event.type for event in raw]
    assert kinds[:2] == ["message_start", "content_block_start"]
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]


def tools(client):
    messages = [user("What is the weather in Paris?")]
    options = {"tools": [TOOL], "tool_choice": {"type": "tool", "name": "get_weather"}, "max_tokens": 60}
    message = ask(client, messages, **options)
    (call,) = [part for part in message.content if part.type == "tool_use"]
    assert message.stop_reason == "tool_use"
    assert call.name == "get_weather" and set(call.input) == {"city"} and call.id.startswith("toolu_")
    with client.messages.stream(model=MODEL, messages=messages, extra_body=GREEDY, **options) as stream:
        final = stream.get_final_message()
    assert next(part for part in final.content if part.type == "tool_use").input == call.input
    result = {"type": "tool_result", "tool_use_id": call.id, "content": [block("Rain, 12 degrees.")]}
    turns = [
        *messages,
        {"role": "assistant", "content": [part.model_dump() for part in message.content]},
        user([result]),
    ]
    assert ask(client, turns, tools=[TOOL]).content
    any_tool = ask(client, messages, tools=[TOOL], tool_choice={"type": "any"}, max_tokens=60)
    assert any_tool.stop_reason == "tool_use"


def published_example(client):
    """A long text behind a mark: the first call creates N, the second reads N, the answers are the same."""
    system = [block("You analyse texts."), block(text(1), SHORT)]
    first = ask(client, [user("What is it about?")], system=system)
    second = ask(client, [user("What is it about?")], system=system)
    created, read, rest = counts(first)
    assert created > 600 and read == 0 and rest > 0
    assert counts(second) == (0, created, rest)
    assert second.content == first.content
    split = first.usage.cache_creation
    assert (split.ephemeral_5m_input_tokens, split.ephemeral_1h_input_tokens) == (created, 0)
    third = ask(client, [user("And who wrote it?")], system=system)
    assert counts(third)[:2] == (0, created)


def mixed(client):
    """An hour for the text, five minutes for the conversation; the conversation goes on."""
    system = [block(text(2), LONG)]
    turns = [user([block("First question: " + text(3, 100), SHORT)])]
    first = ask(client, turns, system=system)
    split = first.usage.cache_creation
    assert split.ephemeral_1h_input_tokens > 600 and split.ephemeral_5m_input_tokens > 50
    turns += [{"role": "assistant", "content": "An answer."}, user([block("Second: " + text(4, 100), SHORT)])]
    second = ask(client, turns, system=system)
    created, read, _ = counts(second)
    assert read == counts(first)[0] and created > 50
    assert second.usage.cache_creation.ephemeral_1h_input_tokens == 0


def automatic(client):
    """The top-level form moves the mark to the last block by itself."""
    extra = {"cache_control": SHORT}
    first = ask(client, [user(text(5))], extra_body=extra)
    assert counts(first)[0] > 600
    again = [user(text(5)), {"role": "assistant", "content": "Yes."}, user("Go on.")]
    assert counts(ask(client, again, extra_body=extra))[1] == counts(first)[0]


def warmed(client):
    """max_tokens 0 writes and answers nothing."""
    system = [block(text(6), SHORT)]
    warm = ask(client, [user("-")], system=system, max_tokens=0)
    assert warm.content == [] and warm.stop_reason == "max_tokens" and warm.usage.output_tokens == 0
    created = counts(warm)[0]
    assert created > 600
    assert counts(ask(client, [user("What is it about?")], system=system))[1] == created


def passive(client):
    """Without marks: automatic, nothing is a write."""
    messages = [user(text(7))]
    first, second = ask(client, messages), ask(client, messages)
    assert counts(first)[0] == counts(second)[0] == 0
    assert counts(second)[1] > 600 and counts(second)[1] + counts(second)[2] == total(first)
    assert second.content == first.content


def below_minimum(client):
    system = [block("A short text.", SHORT)]
    for _ in range(2):
        assert counts(ask(client, [user("Hello.")], system=system))[:2] == (0, 0)


def counted(client):
    turns = {"system": [block(text(8, 100), SHORT)], "tools": [TOOL], "messages": [user("Hello.")]}
    n = client.messages.count_tokens(model=MODEL, **turns).input_tokens
    assert n == total(ask(client, turns.pop("messages"), **turns))


def diagnosed(client):
    turns = [user(text(9))]
    first = ask(client, turns, extra_body={"cache_control": SHORT, "diagnostics": {"previous_message_id": None}})
    extra = {"cache_control": SHORT, "diagnostics": {"previous_message_id": first.id}}
    changed = ask(client, turns, system="Something else.", extra_body=extra)
    reason = changed.model_dump()["diagnostics"]["cache_miss_reason"]
    assert reason["type"] == "system_changed" and reason["cache_missed_input_tokens"] > 600
    same = ask(client, turns, extra_body=extra)
    assert same.model_dump()["diagnostics"] is None
    unknown = extra | {"diagnostics": {"previous_message_id": "msg_unknown"}}
    reason = ask(client, turns, system="Else.", extra_body=unknown).model_dump()["diagnostics"]["cache_miss_reason"]
    assert reason["type"] == "previous_message_not_found"


def errors(client):
    marks = [block(f"Part {i}.", SHORT) for i in range(5)]
    for body in (
        {"messages": [user(marks)]},
        {"messages": [user([block(text(1, 20), SHORT), block("b", LONG)])]},
        {"messages": []},
        {"messages": [user([{"type": "image", "source": {"type": "url", "url": "https://example.com/a.png"}}])]},
    ):
        refused = raised(anthropic.BadRequestError, ask, client, body["messages"])
        assert refused.body["type"] == "error" and refused.body["error"]["type"] == "invalid_request_error"
        assert refused.response.headers["request-id"]
    too_long = raised(anthropic.BadRequestError, ask, client, [user(text(1, 5000))])
    assert "tokens" in too_long.body["error"]["message"]
    missing = raised(anthropic.NotFoundError, client.get, "/anthropic/v1/nothing", cast_to=object)
    assert missing.body["error"]["type"] == "not_found_error"


def models(client):
    page = client.models.list()
    assert page.data and page.data[0].type == "model" and page.has_more is False
    assert client.models.retrieve(page.data[0].id).id == page.data[0].id


def raised(kind, call, *args, **more):
    try:
        call(*args, **more)
    except kind as exc:
        return exc
    raise AssertionError(f"no {kind.__name__}")


SUBJECTS = {
    one.__name__: one
    for one in (
        plain, stops, streamed, tools, published_example, mixed, automatic, warmed, passive, below_minimum, counted,
        diagnosed, errors, models,
    )
}  # fmt: skip

if __name__ == "__main__":
    url, key, subject = sys.argv[1:]
    with anthropic.Anthropic(api_key=key, base_url=url, timeout=600, max_retries=0) as made:
        SUBJECTS[subject](made)
