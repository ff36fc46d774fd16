"""The stored transcripts hold exactly, and the SDKs' own models accept every stored answer."""

import json
from pathlib import Path

import httpx2  # the HTTP client of the anthropic SDK
import msgspec
import pytest
from anthropic import Anthropic
from anthropic.types import Message
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from tests.golden.transcripts import ALL, HERE, expectations, neutral

ANSWERS = sorted(path for path in (HERE / "answers").glob("*/*.http") if path.stem != "anthropic")
STREAMS = sorted(path for path in (HERE / "answers").glob("*/*.sse") if path.stem != "anthropic")
ANTHROPIC_ANSWERS = sorted((HERE / "answers").glob("*/anthropic.http"))
ANTHROPIC_STREAMS = sorted((HERE / "answers").glob("*/anthropic.sse"))
CONVERSATIONS = sorted((HERE / "conversations").glob("*.json"))


def shown(path: Path) -> str:
    return path.relative_to(HERE).as_posix()


@pytest.mark.parametrize("path,expected", [pytest.param(p, text, id=shown(p)) for p, text in expectations()])
def test_transcript(path: Path, expected: str) -> None:
    assert path.read_text(encoding="utf-8") == expected


@pytest.mark.parametrize("path", ANSWERS, ids=shown)
def test_sdk_reads_whole_answer(path: Path) -> None:
    head, _, body = path.read_text(encoding="utf-8").partition("\n\n")
    document = json.loads(body)
    if head.startswith("200"):
        completion = ChatCompletion.model_validate(document)
        assert completion.usage is not None
        assert completion.usage.total_tokens == completion.usage.prompt_tokens + completion.usage.completion_tokens
    else:
        assert document["error"]["message"]


@pytest.mark.parametrize("path", STREAMS, ids=shown)
def test_sdk_reads_stream(path: Path) -> None:
    frames = [frame.removeprefix("data: ") for frame in path.read_text(encoding="utf-8").split("\n\n")[:-1]]
    failed = "error" in json.loads(frames[-1]) if frames[-1] != "[DONE]" else False
    assert failed or frames[-1] == "[DONE]"
    chunks = [ChatCompletionChunk.model_validate_json(frame) for frame in frames[:-1]]
    whole = path.with_suffix(".http").read_text(encoding="utf-8")
    if not failed:
        completion = ChatCompletion.model_validate_json(whole.partition("\n\n")[2])
        for choice in completion.choices:
            deltas = [c.delta for chunk in chunks for c in chunk.choices if c.index == choice.index]
            assert deltas[0].role == "assistant"
            assert "".join(delta.content or "" for delta in deltas) == (choice.message.content or "")
            arguments = [call.function for delta in deltas for call in delta.tool_calls or []]
            streamed = "".join(function.arguments or "" for function in arguments if function)
            called = [call.function.arguments for call in choice.message.tool_calls or [] if call.type == "function"]
            assert streamed == "".join(called)


@pytest.mark.parametrize("path", CONVERSATIONS, ids=shown)
def test_one_conversation_is_one_request_in_every_dialect(path: Path) -> None:
    case = msgspec.json.decode(path.read_bytes())
    assert case["bodies"].keys() | case["not_in"].keys() == ALL.keys()
    for name, body in case["bodies"].items():
        assert json.loads(msgspec.json.encode(neutral(name, body))) == case["expect"], name


@pytest.mark.parametrize("path", ANTHROPIC_ANSWERS, ids=shown)
def test_anthropic_sdk_reads_whole_answer(path: Path) -> None:
    head, _, body = path.read_text(encoding="utf-8").partition("\n\n")
    if not head.startswith("200"):
        document = json.loads(body)
        assert document["type"] == "error" and document["error"]["message"] and document["request_id"]
        return
    usage = Message.model_validate_json(body, strict=True).usage
    assert usage.cache_creation is not None
    split = usage.cache_creation.ephemeral_5m_input_tokens + usage.cache_creation.ephemeral_1h_input_tokens
    assert usage.cache_creation_input_tokens == split


@pytest.mark.parametrize("path", ANTHROPIC_STREAMS, ids=shown)
def test_anthropic_sdk_folds_the_stream_to_the_whole_answer(path: Path) -> None:
    frames = [frame.split("\n") for frame in path.read_text(encoding="utf-8").split("\n\n")[:-1]]
    assert all(len(lines) == 2 for lines in frames)
    events = [json.loads(data.removeprefix("data: ")) for _, data in frames]
    assert [name for name, _ in frames] == [f"event: {event['type']}" for event in events]
    if events[-1]["type"] == "error":
        return
    sse = httpx2.Response(200, headers={"content-type": "text/event-stream"}, content=path.read_bytes())
    with (
        httpx2.Client(transport=httpx2.MockTransport(lambda _: sse)) as http,
        Anthropic(api_key="sk", http_client=http).messages.stream(
            model="m", max_tokens=1, messages=[{"role": "user", "content": "q"}]
        ) as stream,
    ):
        message = stream.get_final_message()
    whole = path.with_suffix(".http").read_text(encoding="utf-8").partition("\n\n")[2]
    assert message.model_dump() | {"content": None} == Message.model_validate_json(whole).model_dump() | {
        "content": None
    }
    assert [block.to_dict() for block in message.content] == json.loads(whole)["content"]
