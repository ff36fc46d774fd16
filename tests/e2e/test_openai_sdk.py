"""The official openai SDK against the real server process on the real model: what a client relies on."""

import concurrent.futures
import json
import time

import openai
import pytest

from tests.e2e.texts import context

pytestmark = [pytest.mark.e2e, pytest.mark.real, pytest.mark.timeout(900)]
MODEL = "moonshot-v1-8k"
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 20}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


def ask(client, messages, **more):
    return client.chat.completions.create(
        **{"model": MODEL, "messages": messages, "temperature": 0, "max_tokens": 12} | more
    )


def user(text):
    return {"role": "user", "content": text}


def system(seed, n_words=450):
    return {"role": "system", "content": context(seed, n_words)}


def create(client, **body):
    """A cache object, waited for until it is not pending any more."""
    made = client.post("/caching", body={"model": "moonshot-v1", "ttl": 600} | body, cast_to=object)
    assert made["status"] == "pending"
    return made, wait(client, made["id"])


def wait(client, cache_id):
    for _ in range(600):
        found = client.get(f"/caching/{cache_id}", cast_to=object)
        if found["status"] != "pending":
            return found
        time.sleep(0.2)
    raise AssertionError("still pending")


def test_a_simple_chat(server):
    answer = ask(server.client(), [user("Say hello.")])
    choice = answer.choices[0]
    assert choice.message.role == "assistant"
    assert choice.message.content
    assert choice.finish_reason in ("stop", "length")
    usage = answer.usage
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert 0 < usage.completion_tokens <= 12
    assert answer.model == MODEL


def test_the_next_turn_of_a_conversation_hits(server):
    client = server.client("multi-turn")
    messages = [system(1), user("What is this text about?")]
    first = ask(client, messages)
    messages += [{"role": "assistant", "content": first.choices[0].message.content}, user("And who reads it?")]
    server.wait_idle()
    second = ask(client, messages)
    assert second.usage.prompt_tokens_details.cached_tokens >= first.usage.prompt_tokens - 2
    messages += [{"role": "assistant", "content": second.choices[0].message.content}, user("Why?")]
    server.wait_idle()  # the second turn went on, so its answer is settled while the engine is idle
    third = ask(client, messages)
    assert third.usage.prompt_tokens_details.cached_tokens >= second.usage.prompt_tokens - 2
    assert third.usage.prompt_tokens - third.usage.prompt_tokens_details.cached_tokens < 40


def test_cached_and_uncached_answers_are_the_same_in_both_forms_and_after_an_engine_restart(server):
    knowledge, question = system(2), user("Name one thing it says.")
    uncached = ask(server.client("never-cached"), [knowledge, question], max_tokens=24)
    assert uncached.usage.cached_tokens == 0
    client = server.client("objects")
    made, ready = create(
        client, messages=[knowledge], tools=[], name="notes", description="d", metadata={"biz_id": "7"}, tags=["notes"]
    )
    assert ready["status"] == "ready", ready
    assert (ready["object"], ready["name"], ready["metadata"]) == ("context-cache", "notes", {"biz_id": "7"})
    assert ready["tokens"] == made["tokens"] > 400

    by_role = ask(
        client, [{"role": "cache", "content": f"cache_id={made['id']};reset_ttl=300"}, question], max_tokens=24
    )
    assert by_role.choices[0].message.content == uncached.choices[0].message.content
    assert by_role.usage.cached_tokens >= made["tokens"]
    assert by_role.usage.prompt_tokens == uncached.usage.prompt_tokens

    by_tag = ask(client, [{"role": "cache", "content": "tag=notes"}, question], max_tokens=24)
    assert by_tag.choices[0].message.content == uncached.choices[0].message.content

    raw = client.chat.completions.with_raw_response.create(
        model=MODEL, messages=[knowledge, question], tools=[], temperature=0, max_tokens=24,
        extra_headers={"X-Msh-Context-Cache": made["id"], "X-Msh-Context-Cache-Reset-TTL": "300"},
    )  # fmt: skip
    assert raw.headers["msh-context-cache-id"] == made["id"]
    assert int(raw.headers["msh-context-cache-token-saved"]) >= made["tokens"]
    assert 0 < int(raw.headers["msh-context-cache-token-ttl"]) <= 300
    assert raw.parse().choices[0].message.content == uncached.choices[0].message.content

    epoch = server.health()["engine"]["epoch"]
    client.post("../admin/engine/restart", cast_to=object)
    server.wait_ready(epoch + 1)
    assert wait(client, made["id"])["status"] == "ready"
    restarted = ask(client, [{"role": "cache", "content": f"cache_id={made['id']}"}, question], max_tokens=24)
    assert restarted.choices[0].message.content == uncached.choices[0].message.content
    assert restarted.usage.cached_tokens >= made["tokens"]  # the question was asked twice, so it is on disk as well


def test_objects_belong_to_a_tenant_and_blocks_too(server):
    knowledge, question = system(3), user("What does it say first?")
    ours, theirs = server.client("tenant-a"), server.client("tenant-b")
    made, ready = create(ours, messages=[knowledge])
    assert ready["status"] == "ready"
    same_tenant = ask(server.client("tenant-a"), [knowledge, question], max_tokens=2)
    other_tenant = ask(theirs, [knowledge, question], max_tokens=2)
    assert same_tenant.usage.cached_tokens >= made["tokens"]
    assert other_tenant.usage.cached_tokens == 0
    with pytest.raises(openai.NotFoundError):
        theirs.get(f"/caching/{made['id']}", cast_to=object)
    with pytest.raises(openai.NotFoundError):
        ask(theirs, [{"role": "cache", "content": f"cache_id={made['id']}"}, question])
    assert theirs.get("/caching", cast_to=object)["data"] == []


def test_a_stream_is_the_whole_answer_and_carries_its_usage(server):
    client = server.client("stream")
    messages = [user("Count from one to ten in words.")]
    whole = ask(client, messages, max_tokens=20)
    chunks = list(ask(client, messages, max_tokens=20, stream=True, stream_options={"include_usage": True}))
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    finishing = next(c for c in chunks if c.choices and c.choices[0].finish_reason)
    assert finishing.choices[0].model_extra["usage"]["completion_tokens"] == whole.usage.completion_tokens
    assert chunks[-1].choices == []
    assert chunks[-1].usage.prompt_tokens == whole.usage.prompt_tokens


def test_a_required_tool_call_and_its_result(server):
    client = server.client("tools")
    messages = [user("What is the weather in Paris?")]
    answer = ask(client, messages, tools=[TOOL], tool_choice="required", max_tokens=60)
    choice = answer.choices[0]
    assert choice.finish_reason == "tool_calls"
    (call,) = choice.message.tool_calls
    assert call.function.name == "get_weather"
    assert set(json.loads(call.function.arguments)) == {"city"}
    messages += [choice.message.model_dump(exclude_none=True)]
    messages += [{"role": "tool", "tool_call_id": call.id, "name": "get_weather", "content": "Rain, 12 degrees."}]
    assert ask(client, messages, tools=[TOOL]).choices[0].message.content
    chunks = list(ask(client, messages[:1], tools=[TOOL], tool_choice="required", max_tokens=60, stream=True))
    parts = [t for c in chunks if c.choices for t in c.choices[0].delta.tool_calls or []]
    assert parts[0].function.name == "get_weather"
    assert "".join(p.function.arguments or "" for p in parts) == call.function.arguments


def test_json_mode_and_json_schema(server):
    client = server.client("json")
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 12}, "kind": {"enum": ['a"b', "c\\d"]}},
        "required": ["name", "kind"],
        "additionalProperties": False,
    }
    fitted = ask(
        client, [user("A person as JSON")], max_tokens=60,
        response_format={"type": "json_schema", "json_schema": {"name": "p", "schema": schema}},
    )  # fmt: skip
    value = json.loads(fitted.choices[0].message.content)
    assert set(value) == {"name", "kind"}
    assert value["kind"] in ('a"b', "c\\d")
    plain = ask(client, [user("A JSON object with one key")], max_tokens=80, response_format={"type": "json_object"})
    assert plain.choices[0].message.content.lstrip().startswith("{")


def test_sampling_parameters_do_what_they_say(server):
    client = server.client("sampling")
    messages = [user("Write a sentence about the sea.")]
    seeded = [
        ask(client, messages, temperature=1.0, seed=11, max_tokens=10).choices[0].message.content for _ in range(2)
    ]
    assert seeded[0] == seeded[1]
    many = ask(client, messages, temperature=1.0, n=2, max_tokens=8)
    assert [c.index for c in many.choices] == [0, 1]
    assert many.usage.completion_tokens <= 16
    greedy = ask(client, messages, max_tokens=12).choices[0].message.content
    stop = greedy.split()[2]
    stopped = ask(client, messages, max_tokens=12, stop=[stop])
    assert stopped.choices[0].message.content == greedy[: greedy.index(stop)]
    assert stopped.choices[0].finish_reason == "stop"
    scored = ask(client, messages, max_tokens=3, logprobs=True, top_logprobs=2)
    for token in scored.choices[0].logprobs.content:
        assert token.logprob <= 0
        assert token.top_logprobs[0].logprob == pytest.approx(token.logprob)
    first = scored.choices[0].logprobs.content[0]
    penalised = ask(client, messages, max_tokens=8, presence_penalty=2, frequency_penalty=2)
    assert penalised.choices[0].message.content
    assert first.token


def test_partial_mode_continues_the_given_text(server):
    client = server.client("partial")
    messages = [
        user("Who was the first to walk on the Moon?"),
        {"role": "assistant", "content": "It was Neil", "partial": True},
    ]
    answer = ask(client, messages, max_tokens=4)
    assert answer.choices[0].message.content.startswith(" Armstrong")


def test_eight_users_over_one_new_context_compute_it_once(server):
    client = server.client("crowd")
    before = server.wait_idle()["engine"]["n_tokens_evaluated"]
    knowledge = system(4)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda i: ask(client, [knowledge, user(f"Question {i}?")], max_tokens=2), range(8)))
    evaluated = server.wait_idle()["engine"]["n_tokens_evaluated"] - before
    prompt = answers[0].usage.prompt_tokens
    assert sum(a.usage.prompt_tokens - a.usage.cached_tokens for a in answers) == evaluated
    assert evaluated < prompt + 8 * 25


def test_a_client_that_goes_away_gives_its_stream_back(server):
    client = server.client("leaver")
    stream = ask(client, [user("Tell me a very long story.")], max_tokens=1500, stream=True)
    next(iter(stream))
    stream.close()
    health = server.wait_idle()
    assert health["engine"]["n_running"] == 0


@pytest.mark.parametrize(
    "change, status, kind",
    [
        ({"messages": [user(5)]}, 400, "invalid_request_error"),
        ({"max_tokens": 100_000}, 400, "invalid_request_error"),
        ({"messages": [{"role": "cache", "content": "cache_id=cache-nope"}, user("x")]}, 404, "resource_not_found_error"),
        ({"messages": [{"role": "cache", "content": "cache_id=cache-nope"}, user("x")], "tools": []}, 400, "invalid_request_error"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"$ref": "http://127.0.0.1/x"}}}}, 400, "invalid_request_error"),
    ],
)  # fmt: skip
def test_errors_are_the_dialects_own(server, change, status, kind):
    with pytest.raises(openai.APIStatusError) as caught:
        ask(server.client(), **{"messages": [user("hi")]} | change)
    assert caught.value.status_code == status
    assert caught.value.body["type"] == kind
    assert "Traceback" not in caught.value.message


def test_lists_tags_updates_and_deletes(server):
    client = server.client("lists")
    made = [
        create(client, messages=[{"role": "system", "content": f"You are number {i}."}], metadata={"n": str(i)})[0]
        for i in range(3)
    ]
    listed = client.get("/caching", cast_to=object, options={"params": {"limit": 2, "order": "asc"}})
    assert [c["id"] for c in listed["data"]] == [m["id"] for m in made[:2]]
    filtered = client.get("/caching", cast_to=object, options={"params": {"metadata[n]": "2"}})
    assert [c["id"] for c in filtered["data"]] == [made[2]["id"]]
    client.post("/caching/refs/tags", body={"tag": "latest", "cache_id": made[0]["id"]}, cast_to=object)
    client.post("/caching/refs/tags", body={"tag": "latest", "cache_id": made[1]["id"]}, cast_to=object)
    assert client.get("/caching/refs/tags/latest/content", cast_to=object)["id"] == made[1]["id"]
    updated = client.put(f"/caching/{made[0]['id']}", body={"ttl": 1200, "metadata": {"n": "9"}}, cast_to=object)
    assert updated["metadata"] == {"n": "9"}
    assert updated["expired_at"] > made[0]["expired_at"]
    assert wait(client, made[0]["id"])["status"] == "ready"
    assert client.delete(f"/caching/{made[0]['id']}", cast_to=object) == {
        "deleted": True,
        "id": made[0]["id"],
        "object": "context_cache_object.deleted",
    }
    with pytest.raises(openai.NotFoundError):
        client.get(f"/caching/{made[0]['id']}", cast_to=object)
