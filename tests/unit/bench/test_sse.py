import msgspec
import pytest

from keepwarm.bench.sse import Usage, engine_ms, read_frame, read_timings, split_events, until_first_token

TIMINGS = b': keepwarm-timings {"auth_ms":0.1,"render_ms":1.5,"engine_evaluate_ms":20.0,"engine_decode_ms":300.0}'


def test_events_are_split_and_the_rest_is_kept() -> None:
    assert split_events(b"data: 1\n\n: two\n\ndata: 3") == ([b"data: 1", b": two"], b"data: 3")
    assert split_events(b"data: 1") == ([], b"data: 1")


def test_the_role_chunk_brings_no_text() -> None:
    frame = read_frame(
        b'data: {"choices":[{"index":0,"delta":{"role":"assistant","content":""},"finish_reason":null}]}'
    )
    assert frame is not None
    assert not frame.has_text and not frame.is_last and frame.usage is None


def test_a_text_chunk_and_the_finishing_chunk_with_kimis_usage() -> None:
    text = read_frame(b'data: {"choices":[{"index":0,"delta":{"content":"a"},"finish_reason":null}]}')
    last = read_frame(
        b'data: {"choices":[{"index":0,"delta":{},"finish_reason":"length",'
        b'"usage":{"prompt_tokens":30,"completion_tokens":2,"total_tokens":32,"cached_tokens":16}}]}'
    )
    assert text is not None and text.has_text and not text.is_last
    assert last is not None and last.is_last and last.usage == Usage(30, 2, 16)


def test_usage_without_cached_tokens_means_none_were() -> None:
    last = read_frame(
        b'data: {"choices":[{"delta":{},"finish_reason":"stop","usage":{"prompt_tokens":3,"completion_tokens":1}}]}'
    )
    assert last is not None and last.usage == Usage(3, 1, 0)


@pytest.mark.parametrize("event", [b": keepalive", b"data: [DONE]", TIMINGS])
def test_comments_and_the_end_marker_are_no_frames(event: bytes) -> None:
    assert read_frame(event) is None


def test_a_broken_frame_is_not_passed_over() -> None:
    with pytest.raises(msgspec.DecodeError):
        read_frame(b'data: {"choices":')


def test_timings_come_in_their_own_comment_only() -> None:
    assert read_timings(b": keepalive") is None
    assert read_timings(b"data: {}") is None
    timings = read_timings(TIMINGS)
    assert timings == {"auth_ms": 0.1, "render_ms": 1.5, "engine_evaluate_ms": 20.0, "engine_decode_ms": 300.0}


def test_the_phases_add_up_to_the_time_to_the_first_token() -> None:
    phases = until_first_token(25.0, read_timings(TIMINGS) or {})
    assert phases == {"http_ms": 3.4, "auth_ms": 0.1, "render_ms": 1.5, "engine_evaluate_ms": 20.0}
    assert sum(phases.values()) == pytest.approx(25.0)


def test_engine_time_is_all_of_the_engines() -> None:
    assert engine_ms(read_timings(TIMINGS) or {}) == 320.0
