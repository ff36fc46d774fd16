"""The stored transcripts hold exactly, and the openai SDK's own models accept every stored answer."""

import json
from pathlib import Path

import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from tests.golden.transcripts import HERE, expectations

ANSWERS = sorted((HERE / "answers").glob("*/*.http"))
STREAMS = sorted((HERE / "answers").glob("*/*.sse"))


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
