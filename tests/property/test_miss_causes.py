"""One change is planted into a random conversation, and the cause, the block and the place must be that change's.

The twin of the engine is a store without limits: it has every finished prompt, cut to its granularity, and a turn's last two
tokens are always evaluated. What takes something away (expiry, eviction, …) is planted into what it says.
"""

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from msgspec import Struct
from msgspec.structs import replace

from keepwarm.cache.misses import Asked, Facts, blocks_of, explain
from keepwarm.core.cache_lookup import CacheLookup, MissCause
from keepwarm.core.prompt import Tokens
from keepwarm.core.request import ChatRequest, Message, TextPart, Tool

TOKENS_MIN = 512
WORDS = ("alpha ", "beta ", "gamma ", "delta ", "epsilon ", "zeta ")
GRANULARITIES = (1, 8, 64)


class Case(Struct, frozen=True):
    """A conversation that was asked before, other prompts of the tenant around it, and the model's granularity."""

    request: ChatRequest
    noise: tuple[ChatRequest, ...]
    g: int

    @property
    def before(self) -> Asked:
        return asked(self.request, "before", is_finished=True)

    def recent(self, before: Asked | None) -> list[Asked]:
        noise = [asked(one, f"noise {i}", is_finished=True) for i, one in enumerate(self.noise)]
        return noise if before is None else [*noise[:1], before, *noise[1:]]


def rendered(request: ChatRequest) -> Tokens:
    """Tools, system, messages; bytes as tokens, and two for the beginning and end of a block."""
    texts = [tool.description for tool in request.tools] + [message.text for message in request.messages]
    return np.array([token for text in texts for token in (256, *text.encode(), 257)] + [258], np.int32)


def asked(request: ChatRequest, turn_id: str = "now", *, is_finished: bool = False) -> Asked:
    return Asked(turn_id, request.model, "template", rendered(request), blocks_of(request), is_finished=is_finished)


def shown(tokens: Tokens) -> str:
    return "".join(chr(token) if token < 256 else "|" for token in tokens.tolist())


def n_shared(left: Tokens, right: Tokens) -> int:
    pairs = zip(left.tolist(), right.tolist(), strict=False)
    return next((i for i, (here, there) in enumerate(pairs) if here != there), min(len(left), len(right)))


def stored(now: Asked, recent: list[Asked], g: int) -> int:
    """Tokens that the store without limits reads."""
    same = [one for one in recent if (one.model, one.template) == (now.model, now.template) and one.is_finished]
    n = max((n_shared(now.tokens, one.tokens) for one in same), default=0)
    return min(n, len(now.tokens) - 2) // g * g


def look(now: Asked, recent: list[Asked], n_read: int, **facts: object) -> CacheLookup:
    known = Facts(end=len(now.tokens), tokens_min=TOKENS_MIN, n_found=n_read, n_read=n_read, tier="host")
    return explain(now, recent, replace(known, **facts), shown)


texts = st.builds(str.__mul__, st.sampled_from(WORDS), st.integers(40, 80))


@st.composite
def requests(draw: st.DrawFn, mark: str) -> ChatRequest:
    """`mark` begins every text, so that conversations with different ones have nothing in common."""
    tools = draw(st.lists(texts, max_size=4))
    messages = draw(st.lists(texts, min_size=3, max_size=8))
    system = draw(st.lists(texts, max_size=1))
    return ChatRequest(
        "small",
        (
            *(Message("system", (TextPart(f"{mark}s {text}"),)) for text in system),
            *(
                Message("assistant" if i % 2 else "user", (TextPart(f"{mark}m{i} {text}"),))
                for i, text in enumerate(messages)
            ),
        ),
        tools=tuple(Tool(f"{mark}{i}", f"{mark}t{i} {text}", "{}") for i, text in enumerate(tools)),
    )


cases = st.builds(
    Case,
    requests("a"),
    st.lists(st.sampled_from("bcd").flatmap(requests), max_size=3).map(tuple),
    st.sampled_from(GRANULARITIES),
)


def changed(text: str, at: int) -> str:
    return f"{text[: at % 40]}#{text[at % 40 + 1 :]}"


def with_text(request: ChatRequest, i: int, at: int) -> ChatRequest:
    messages = list(request.messages)
    messages[i] = replace(messages[i], parts=(TextPart(changed(messages[i].text, at)),))
    return replace(request, messages=tuple(messages))


def check_change(case: Case, now: Asked, cause: MissCause, block: str | None = None) -> None:
    before = case.before
    n_read = stored(now, case.recent(before), case.g)
    found = look(now, case.recent(before), n_read)
    assert (found.cause, found.compared_with) == (cause, "before")
    assert found.outcome == ("partial" if n_read >= 64 else "miss")
    assert found.n_missed == min(len(before.tokens), len(now.tokens)) - n_read > 0
    assert found.place is not None
    n = n_shared(now.tokens, before.tokens)
    assert found.place.n_shared == n
    assert found.place.before == shown(now.tokens[max(0, n - 12) : n])
    assert found.place.here == shown(now.tokens[n : n + 12])
    assert found.place.there == shown(before.tokens[n : n + 12])
    if block is not None:
        assert found.place.block == block


@given(cases)
def test_another_model_or_template(case: Case) -> None:
    now = asked(case.request)
    check_change(case, replace(now, model="large"), MissCause.MODEL_CHANGED)
    check_change(case, replace(now, template="other"), MissCause.TEMPLATE_CHANGED)


@given(cases, st.data())
def test_a_tool_that_changed_came_went_or_moved(case: Case, data: st.DataObject) -> None:
    tools = case.request.tools
    assume(tools)
    i = data.draw(st.integers(0, len(tools) - 1))
    other = replace(tools[i], description=changed(tools[i].description, data.draw(st.integers(0, 39))))
    assert other != tools[i]
    for new in ((other,), (), (other, tools[i])):
        now = asked(replace(case.request, tools=(*tools[:i], *new, *tools[i + 1 :])))
        check_change(case, now, MissCause.TOOLS_CHANGED, f"tools[{i}]")
    if i + 1 < len(tools):
        moved = (*tools[:i], *reversed(tools[i:]))
        check_change(case, asked(replace(case.request, tools=moved)), MissCause.TOOLS_CHANGED, f"tools[{i}]")


@given(cases, st.integers(0, 39))
def test_the_system_text(case: Case, at: int) -> None:
    assume(case.request.messages[0].role == "system")
    check_change(case, asked(with_text(case.request, 0, at)), MissCause.SYSTEM_CHANGED, "system")
    without = replace(case.request, messages=case.request.messages[1:])
    check_change(case, asked(without), MissCause.SYSTEM_CHANGED, "system")


@given(cases, st.data(), st.booleans())
def test_a_message_whether_or_not_the_conversation_goes_on(case: Case, data: st.DataObject, goes_on: bool) -> None:
    n_system = case.request.messages[0].role == "system"
    i = data.draw(st.integers(n_system, len(case.request.messages) - 1))
    request = with_text(case.request, i, data.draw(st.integers(0, 39)))
    if goes_on:
        request = replace(request, messages=(*request.messages, Message("user", (TextPart("and " * 100),))))
    check_change(case, asked(request), MissCause.MESSAGES_CHANGED, f"messages[{i - n_system}]")


@given(cases, st.lists(texts, max_size=3))
def test_the_same_again_and_a_conversation_that_goes_on_are_hits(case: Case, more: list[str]) -> None:
    messages = (*case.request.messages, *(Message("user", (TextPart(f"m{text}"),)) for text in more))
    now = asked(replace(case.request, messages=messages))
    recent = case.recent(case.before)
    found = look(now, recent, stored(now, recent, case.g))
    assert (found.outcome, found.cause, found.n_missed, found.place) == ("hit", None, 0, None)


@given(cases)
def test_nothing_like_it(case: Case) -> None:
    now = asked(case.request)
    recent = case.recent(None)
    found = look(now, recent, stored(now, recent, case.g))
    assert (found.outcome, found.cause, found.compared_with) == ("miss", MissCause.FIRST_SEEN, None)
    assert look(now, recent, 0, lost=MissCause.DELETED).cause is MissCause.DELETED


@pytest.mark.parametrize("cause", [MissCause.EVICTED, MissCause.STILL_BEING_WRITTEN, MissCause.SLOWER_THAN_RECOMPUTING,
                                   MissCause.DELETED, MissCause.EXPIRED])  # fmt: skip
@settings(max_examples=40)
@given(cases, st.lists(texts, max_size=2), st.integers(0, 300))
def test_what_was_taken_away(cause: MissCause, case: Case, more: list[str], n_read: int) -> None:
    """The same or a conversation that goes on; of what an earlier prompt has, only `n_read` tokens are read."""
    messages = (*case.request.messages, *(Message("user", (TextPart(f"m{text}"),)) for text in more))
    now = asked(replace(case.request, messages=messages))
    before = replace(case.before, is_finished=cause is not MissCause.STILL_BEING_WRITTEN)
    n = n_shared(now.tokens, before.tokens)
    facts: dict[str, object] = {
        MissCause.SLOWER_THAN_RECOMPUTING: {"n_found": n},
        MissCause.DELETED: {"lost": MissCause.DELETED},
        MissCause.EXPIRED: {"n_expired": n, "is_automatic": False},
    }.get(cause, {})  # type: ignore[assignment]
    found = look(now, case.recent(before), n_read, **facts)
    assert (found.cause, found.n_missed) == (cause, n - n_read)
    assert found.outcome == ("partial" if n_read >= 64 else "miss")


@given(cases, st.integers(1, TOKENS_MIN - 1))
def test_too_short(case: Case, n_tokens: int) -> None:
    now = asked(case.request)
    short = replace(now, tokens=now.tokens[:n_tokens])
    found = look(short, case.recent(replace(case.before, tokens=short.tokens, is_cached=False)), 0)
    assert (found.outcome, found.cause) == ("miss", MissCause.BELOW_MINIMUM)
