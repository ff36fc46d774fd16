"""Random traffic in the words of every vendor: bodies, and what the vendor's own usage fields say when they are added up
as that vendor's documentation does."""

import http.client
import json
from dataclasses import dataclass, field

N_PROMPT_MAX = 2600  # bytes, each of which the scripted model takes as a token
TEXTS = ("The tide tables of the harbour, page by page. ", "Grain and letters, counted twice. ", "All lamps by night. ")
QUESTIONS = ("How many ships?", "Who counts them, and why twice a day? Answer in full.", "When?")
MARKS = (None, {"type": "ephemeral"}, {"type": "ephemeral", "ttl": "1h"})
REFUSED = 0.04
DIALECTS = ("kimi", "openai", "minimax", "anthropic", "gemini")
PATHS = {"kimi": "/v1", "openai": "/openai/v1", "minimax": "/minimax/v1"}


@dataclass(frozen=True)
class Told:
    """Tokens of one turn as its vendor tells them; None where it has no field for that."""

    dialect: str
    prompt: int
    read: int
    output: int
    written: int | None = None
    written_long: int | None = None


@dataclass(frozen=True)
class Ask:
    """A request; `leave_after` bytes of its answer the client goes away (None: it stays)."""

    dialect: str
    path: str
    body: dict
    shape: str  # "whole", "events" or "array"
    headers: dict = field(default_factory=dict)
    leave_after: int | None = None


@dataclass(frozen=True)
class Answer:
    """`turn_id` None: the client left before it could know; `told` None: it left, or was refused with `status`."""

    ask: Ask
    status: int | None
    turn_id: str | None
    told: Told | None


class Traffic:
    """One client. The same `chance` asks the same; `objects` are ids by dialect that it may use, with their texts."""

    def __init__(self, port, key, chance, objects=None):
        self._port, self._key, self._chance = port, key, chance
        self._objects = objects or {}
        self._whole_asks = []

    def next(self):
        chance = self._chance
        if self._whole_asks and chance.random() < 0.15:
            return chance.choice(self._whole_asks)  # by its Idempotency-Key it is the same request
        dialect = chance.choice(DIALECTS)
        n_repeats = chance.randrange(1, 45)
        text = (chance.choice(TEXTS) * n_repeats)[:N_PROMPT_MAX]
        if chance.random() < REFUSED:
            text = TEXTS[0] * 400  # beyond the window: refused before any work
        ask = {"anthropic": self._anthropic, "gemini": self._gemini}.get(dialect, self._chat)(dialect, text)
        if ask.leave_after is None and chance.random() < 0.3:
            ask.headers["idempotency-key"] = f"{chance.randrange(10**9)}"
            self._whole_asks.append(ask)
        return ask

    def send(self, ask):
        """Raises OSError or http.client.HTTPException when the server goes away."""
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=60)
        headers = {"authorization": f"Bearer {self._key}", "content-type": "application/json"} | ask.headers
        if ask.dialect == "gemini":
            headers["x-goog-api-key"] = self._key
        try:
            connection.request("POST", ask.path, json.dumps(ask.body), headers)
            if ask.leave_after == 0:
                return Answer(ask, None, None, None)
            reply = connection.getresponse()
            turn_id = reply.headers["x-request-id"]
            if ask.leave_after is not None:
                reply.read(ask.leave_after)
                return Answer(ask, None, turn_id, None)
            body = reply.read()
        finally:
            connection.close()
        if reply.status != 200:
            return Answer(ask, reply.status, turn_id, None)
        return Answer(ask, 200, turn_id, told(ask, body))

    def _leave(self, shape):
        """Some clients go away, before or in the middle."""
        if self._chance.random() < 0.75:
            return None
        return 0 if shape == "whole" else self._chance.choice([0, 1, 200, 900])

    def _object(self, dialect):
        found = self._objects.get(dialect)
        return found if found and self._chance.random() < 0.3 else None

    def _chat(self, dialect, text):
        chance = self._chance
        messages = [{"role": "system", "content": text}, {"role": "user", "content": chance.choice(QUESTIONS)}]
        if dialect == "kimi" and (cache_id := self._object("kimi")):
            messages[0] = {"role": "cache", "content": f"cache_id={cache_id}"}
        body = {"model": "scripted", "messages": messages, "max_tokens": chance.randrange(1, 60)}
        shape = chance.choice(["whole", "events"])
        if shape == "events":
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        if dialect != "minimax" and chance.random() < 0.3:
            body |= {"n": chance.randrange(2, 4), "temperature": 0.9}
        if chance.random() < REFUSED:
            body |= {"response_format": {"type": "json_object"}}  # which the scripted model refuses, after the hold
        return Ask(dialect, f"{PATHS[dialect]}/chat/completions", body, shape, {}, self._leave(shape))

    def _anthropic(self, dialect, text):
        chance = self._chance
        system, question = ({"type": "text", "text": part} for part in (text, chance.choice(QUESTIONS)))
        first, second = sorted(
            (chance.choice(MARKS) for _ in range(2)), key=MARKS.index, reverse=True
        )  # the longer first
        system |= {"cache_control": first} if first else {}
        question |= {"cache_control": second} if second else {}
        body = {"model": "scripted", "system": [system], "messages": [{"role": "user", "content": [question]}]}
        body["max_tokens"] = chance.randrange(60)  # 0 computes and writes alone
        shape = chance.choice(["whole", "events"]) if body["max_tokens"] else "whole"
        if shape == "events":
            body["stream"] = True
        path = chance.choice(["/anthropic", "/minimax/anthropic", ""]) + "/v1/messages"
        return Ask(dialect, path, body, shape, {}, self._leave(shape))

    def _gemini(self, dialect, text):
        chance = self._chance
        said = [{"role": "user", "parts": [{"text": chance.choice(QUESTIONS)}]}]
        settings = {"maxOutputTokens": chance.randrange(1, 60)}
        if chance.random() < 0.3:
            settings |= {"candidateCount": 2, "temperature": 0.9}
        body = {"contents": said, "generationConfig": settings}
        if name := self._object("gemini"):
            body["cachedContent"] = name
        else:
            body["systemInstruction"] = {"parts": [{"text": text}]}
        shape = chance.choice(["whole", "events", "array"])
        verb = "generateContent" if shape == "whole" else "streamGenerateContent"
        path = f"/v1beta/models/scripted:{verb}" + ("?alt=sse" if shape == "events" else "")
        return Ask(dialect, path, body, shape, {}, self._leave(shape))


def told(ask, body):
    """Of a whole answer. One that is broken off by an error has no usage: None."""
    if ask.shape == "events":
        lines = [line[6:] for line in body.split(b"\n") if line.startswith(b"data: {")]
        parts = [json.loads(line) for line in lines]
    else:
        parts = json.loads(body)
        parts = parts if ask.shape == "array" else [parts]
    if any("error" in part for part in parts):
        return None
    return {"anthropic": _of_messages, "gemini": _of_content}.get(ask.dialect, _of_chat)(ask, parts)


def _of_chat(ask, parts):
    """`prompt_tokens` are all, `cached_tokens` and `cache_write_tokens` parts of them."""
    usage = parts[-1]["usage"]
    details = usage["prompt_tokens_details"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    if ask.dialect == "kimi":
        assert usage["cached_tokens"] == details["cached_tokens"]
        if ask.shape == "events":
            each = [choice["usage"] for part in parts for choice in part["choices"] if choice.get("usage")]
            assert len(each) == ask.body.get("n", 1)
            assert sum(one["completion_tokens"] for one in each) == usage["completion_tokens"]
            assert {one["prompt_tokens"] for one in each} == {usage["prompt_tokens"]}
    return Told(
        ask.dialect,
        usage["prompt_tokens"],
        details["cached_tokens"],
        usage["completion_tokens"],
        details["cache_write_tokens"],
    )


def _of_messages(_ask, parts):
    """The prompt is in three parts, which are added; the last usage is the turn's."""
    usage = next(part["usage"] for part in reversed(parts) if "usage" in part)
    read, written = usage["cache_read_input_tokens"], usage["cache_creation_input_tokens"]
    split = usage["cache_creation"]
    assert split["ephemeral_5m_input_tokens"] + split["ephemeral_1h_input_tokens"] == written
    if parts[0].get("type") == "message_start":
        begun = parts[0]["message"]["usage"]
        for name in ("input_tokens", "cache_read_input_tokens", "cache_creation_input_tokens"):
            assert begun[name] == usage[name]
    prompt = usage["input_tokens"] + read + written
    return Told("anthropic", prompt, read, usage["output_tokens"], written, split["ephemeral_1h_input_tokens"])


def _of_content(_ask, parts):
    """`promptTokenCount` has the cached ones in it."""
    usage = parts[-1]["usageMetadata"]
    prompt, output = usage["promptTokenCount"], usage["candidatesTokenCount"]
    assert usage["totalTokenCount"] == prompt + output
    return Told("gemini", prompt, usage.get("cachedContentTokenCount", 0), output)
