"""One client of the load: carries out a plan's operations over HTTP and writes down in the ledger what was acknowledged.

A connection that breaks is no fault here, it is what a kill looks like; nor is an answer that asks to come again (429,
503). Any other refusal, and any answer the harness cannot read, is written down as a complaint: the round fails by it.
"""

import http.client
import threading
from collections.abc import Mapping
from typing import Any

import msgspec

from keepwarm.core.clock import Clock
from tests.crash.ledger import CALL_S_MAX, Answer, Known, Ledger
from tests.crash.plan import KEYS, Act, Operation, object_text, question_text

HOST = "127.0.0.1"
MODEL = "scripted"
TOKENS_MAX = 16
WATCH_SHARE = 0.7  # of new objects whose creator waits until they are ready
WATCH_CALLS_MAX = 500
WATCH_S = 0.005
COME_AGAIN = (429, 503)
Message = dict[str, str]


class Reply(msgspec.Struct, frozen=True):
    """An answer, whole. `body` is decoded JSON."""

    status: int
    headers: Mapping[str, str]
    body: Any


class Api:
    """Calls of one tenant. Each raises OSError or http.client.HTTPException when there is no whole answer."""

    def __init__(self, port: int, key: str) -> None:
        self._port, self._key = port, key

    def call(self, method: str, path: str, body: object = None) -> Reply:
        connection = http.client.HTTPConnection(HOST, self._port, timeout=CALL_S_MAX)
        try:
            connection.request(method, path, self._encoded(body), {"Authorization": f"Bearer {self._key}"})
            response = connection.getresponse()
            headers = {name.lower(): value for name, value in response.getheaders()}
            return Reply(response.status, headers, msgspec.json.decode(response.read()))
        finally:
            connection.close()

    def leave(self, path: str, body: object) -> int:
        """Ask, and go away at the first byte of the answer."""
        connection = http.client.HTTPConnection(HOST, self._port, timeout=CALL_S_MAX)
        try:
            connection.request("POST", path, self._encoded(body), {"Authorization": f"Bearer {self._key}"})
            response = connection.getresponse()
            response.read(1)
            response.close()
            return response.status
        finally:
            connection.close()

    def _encoded(self, body: object) -> bytes | None:
        return None if body is None else msgspec.json.encode(body)

    def create(self, text: int, ttl_s: int, owner: int) -> Reply:
        body = {
            "model": MODEL,
            "messages": text_messages(text),
            "ttl": ttl_s,
            "metadata": {"text": str(text), "owner": str(owner)},  # so that one whose answer was lost can be adopted
        }
        return self.call("POST", "/v1/caching", body)

    def get(self, cache_id: str) -> Reply:
        return self.call("GET", f"/v1/caching/{cache_id}")

    def delete(self, cache_id: str) -> Reply:
        return self.call("DELETE", f"/v1/caching/{cache_id}")

    def use(self, cache_id: str, question: int, reset_ttl_s: int | None = None) -> Reply:
        reset = "" if reset_ttl_s is None else f";reset_ttl={reset_ttl_s}"
        named = {"role": "cache", "content": f"cache_id={cache_id}{reset}"}
        return self.chat([named, question_message(question)])

    def chat(self, messages: list[Message]) -> Reply:
        return self.call("POST", "/v1/chat/completions", chat_body(messages))


def chat_body(messages: list[Message], *, stream: bool = False) -> dict[str, object]:
    return {"model": MODEL, "messages": messages, "temperature": 0, "max_tokens": TOKENS_MAX, "stream": stream}


def text_messages(text: int) -> list[Message]:
    return [{"role": "system", "content": object_text(text)}]


def question_message(question: int) -> Message:
    return {"role": "user", "content": question_text(question)}


def answer_of(reply: Reply, text: int, question: int) -> Answer:
    """What the server said."""
    choice = reply.body["choices"][0]
    return Answer(text, question, choice["message"]["content"], choice["finish_reason"])


def known_of(body: Any, key: str) -> Known:
    """An object as the server describes it."""
    made = body["metadata"]
    expires_at = body["expired_at"]
    return Known(
        body["id"], key, int(made["owner"]), int(made["text"]), body["tokens"], expires_at, expires_at
    )  # fmt: skip


class Client(threading.Thread):
    """Works through its operations until they are done or `stop` is set. `complaints` must be empty in the end."""

    def __init__(self, number: int, operations: tuple[Operation, ...], port: int, ledger: Ledger, clock: Clock) -> None:
        super().__init__(name=f"client-{number}", daemon=True)
        self._number, self._operations, self._ledger, self._clock = number, operations, ledger, clock
        self._key = KEYS[number % len(KEYS)]
        self._api = Api(port, self._key)
        self.stop = threading.Event()
        self.complaints: list[str] = []

    def run(self) -> None:
        for operation in self._operations:
            if self.stop.is_set():
                return
            self._do(operation)

    def _do(self, operation: Operation) -> None:
        about = operation.act.value
        entry: Known | None = None
        if operation.act in (Act.GET, Act.USE, Act.RESET, Act.DELETE):
            entry = self._ledger.pick(operation, self._key, self._number, self._clock.now())
            if entry is None:
                return
            about += f" {entry.cache_id}"
        else:
            about += f" text {operation.text}"
        try:
            status = self._call(operation, entry)
        except (OSError, http.client.HTTPException) as exc:
            self._ledger.note(f"client {self._number}: {about}: no answer ({type(exc).__name__})", is_answered=False)
            return
        except (msgspec.DecodeError, LookupError, ValueError) as exc:
            self.complaints.append(f"{about}: an answer that cannot be read ({type(exc).__name__}: {exc})")
            status = 0
        if status not in (*COME_AGAIN, *self._allowed(operation, entry)):
            self.complaints.append(f"{about}: answered with {status}")
        self._ledger.note(f"client {self._number}: {about}: {status}", is_answered=True)

    def _allowed(self, operation: Operation, entry: Known | None) -> tuple[int, ...]:
        """Another client may delete an object, and its time may end."""
        if entry is not None and not entry.surely_live(self._clock.now()):
            return (200, 404)
        return (200,)

    def _call(self, operation: Operation, entry: Known | None) -> int:
        match operation.act:
            case Act.CREATE:
                return self._create(operation)
            case Act.CHAT:
                messages = [*text_messages(operation.text), question_message(operation.question)]
                return self._heard(self._api.chat(messages), operation.text, operation.question)
            case Act.LEAVE:
                messages = [*text_messages(operation.text), question_message(operation.question)]
                return self._api.leave("/v1/chat/completions", chat_body(messages, stream=True))
            case _:
                assert entry is not None
                return self._call_about(operation, entry)

    def _call_about(self, operation: Operation, entry: Known) -> int:
        ledger, api = self._ledger, self._api
        match operation.act:
            case Act.GET:
                reply = api.get(entry.cache_id)
                if reply.status == 200 and reply.body["status"] == "ready":
                    ledger.told_ready(entry)
                return reply.status
            case Act.DELETE:
                ledger.delete_sent(entry)
                reply = api.delete(entry.cache_id)
                if reply.status in (200, 404):
                    ledger.delete_acknowledged(entry)
                return reply.status
            case Act.RESET:
                ledger.reset_sent(entry, operation.ttl_s, self._clock.now())
                reply = api.use(entry.cache_id, operation.question, reset_ttl_s=operation.ttl_s)
                told = reply.headers.get("msh-context-cache-token-exp")
                if reply.status == 200 and told is not None:
                    ledger.told_expiry(entry, int(told))
                return self._heard(reply, entry.text, operation.question)
            case _:
                return self._heard(api.use(entry.cache_id, operation.question), entry.text, operation.question)

    def _create(self, operation: Operation) -> int:
        reply = self._api.create(operation.text, operation.ttl_s, self._number)
        if reply.status == 200:
            entry = known_of(reply.body, self._key)
            self._ledger.adopt(entry)
            if operation.pick < WATCH_SHARE:
                self._watch(entry)
        return reply.status

    def _watch(self, entry: Known) -> None:
        """Ask until the new object is no longer pending: a kill right after `ready` was told is what matters most."""
        for _ in range(WATCH_CALLS_MAX):
            reply = self._api.get(entry.cache_id)
            if reply.status != 200 or reply.body["status"] != "pending":
                if reply.status == 200 and reply.body["status"] == "ready":
                    self._ledger.told_ready(entry)
                return
            if self.stop.wait(WATCH_S):
                return

    def _heard(self, reply: Reply, text: int, question: int) -> int:
        if reply.status == 200:
            self._ledger.answer(answer_of(reply, text, question))
        return reply.status
