import pytest
from openai.types.chat import ChatCompletionChunk

from keepwarm.demo import DemoError
from keepwarm.demo.client import Answer, collected

USAGE = {"prompt_tokens": 19, "completion_tokens": 2, "total_tokens": 21, "cached_tokens": 10}


class SteppingClock:
    """A second passes with every look at it."""

    def __init__(self) -> None:
        self.s = 100.0

    def now(self) -> float:
        return self.s

    def monotonic(self) -> float:
        self.s += 1
        return self.s


def chunk(delta: dict[str, str], usage: dict[str, int] | None = None) -> ChatCompletionChunk:
    choice = {"index": 0, "delta": delta, "finish_reason": None if usage is None else "stop"}
    body = {"id": "x", "object": "chat.completion.chunk", "created": 1, "model": "m"}
    return ChatCompletionChunk.model_validate(
        {**body, "choices": [choice if usage is None else {**choice, "usage": usage}]}
    )


OPENING = chunk({"role": "assistant", "content": ""})


def test_the_first_text_counts_and_usage_is_in_the_finishing_chunk() -> None:
    chunks = [OPENING, chunk({"content": "Hi"}), chunk({"content": " you"}), chunk({}, USAGE)]
    assert collected(chunks, 100.5, SteppingClock()) == Answer("Hi you", 19, 10, 2, 500.0)


def test_without_a_count_of_cached_tokens_nothing_was_cached() -> None:
    usage = {name: n for name, n in USAGE.items() if name != "cached_tokens"}
    assert collected([chunk({"content": "Hi"}), chunk({}, usage)], 0, SteppingClock()).n_cached == 0


@pytest.mark.parametrize("chunks", [[], [OPENING], [OPENING, chunk({}, USAGE)], [chunk({"content": "Hi"})]])
def test_an_answer_without_text_or_usage_is_an_error(chunks: list[ChatCompletionChunk]) -> None:
    with pytest.raises(DemoError, match="no text or no usage"):
        collected(chunks, 0, SteppingClock())
