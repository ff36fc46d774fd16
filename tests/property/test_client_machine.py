"""Workers that share a cache book, interleaved call by call with a server of dictionaries, a clock, and every mishap.

Workers are killed or cancelled between a call and its reply, calls and replies are lost, objects fail, expire or are
deleted behind the book's back. Two things hold: an object that is handed out was made from the very knowledge it is
handed out for, and there are never two live objects for one key and knowledge.
"""

from dataclasses import dataclass
from tempfile import TemporaryDirectory

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from keepwarm.client.bookkeeping import Bookkeeping, Call, Reply, advance, end
from keepwarm.client.decision import CLAIM_S, Policy
from keepwarm.client.knowledge import HEADER_USED, Form, Knowledge, Sending
from keepwarm.client.rows import Rows
from tests.world import CountingIds, FakeClock

TTL_S = 400
MODEL = "m"
KEYS = ("k", "k", "k", "l")
FATES = st.sampled_from(["done"] * 6 + ["reply lost", "reply lost", "call lost", "refused"])


@dataclass
class Object:
    """One of the server's."""

    content: str
    mark: str
    status: str
    expires_at: float


class Server:
    """The caching API in the plainest way."""

    def __init__(self, clock):
        self.clock, self.objects, self.contents = clock, {}, {}

    def live(self, cached):
        return cached.status in ("pending", "ready") and self.clock.now() < cached.expires_at

    def perform(self, call: Call) -> Reply:
        if call.method == "POST":
            cache_id = f"cache-{len(self.contents)}"
            mark = call.body["metadata"]["keepwarm_book"]
            made = Object(str(call.body["messages"]), mark, "pending", self.clock.now() + call.body["ttl"])
            self.objects[cache_id], self.contents[cache_id] = made, made.content
            return self.shown(cache_id)
        if call.path == "/caching":
            (mark,) = (value for name, value in call.query.items() if name != "limit")
            found = [self.shown(cache_id).body for cache_id, cached in self.objects.items() if cached.mark == mark]
            return Reply(200, {"data": found[::-1][: call.query["limit"]]})
        cache_id = call.path.removeprefix("/caching/")
        if cache_id not in self.objects:
            return Reply(404)
        if call.method == "DELETE":
            del self.objects[cache_id]
            return Reply(200, {"deleted": True})
        if call.method == "PUT":
            self.objects[cache_id].expires_at = self.clock.now() + call.body["ttl"]
            self.objects[cache_id].status = "pending"
        return self.shown(cache_id)

    def shown(self, cache_id):
        cached = self.objects[cache_id]
        dead = cached.status == "ready" and not self.live(cached)
        status = "inactive" if dead else cached.status
        return Reply(200, {"id": cache_id, "status": status, "metadata": {"keepwarm_book": cached.mark}})


@dataclass
class Worker:
    """One `prepare` under way."""

    steps: object
    knowledge: Knowledge
    began: float
    full: Sending
    call: Call


class Books(RuleBasedStateMachine):
    """`n_knowledge` > 1: an application's old and new version at once."""

    n_knowledge = 1

    def __init__(self):
        super().__init__()
        self.folder = TemporaryDirectory()
        self.clock = FakeClock()
        self.server = Server(self.clock)
        rows = Rows(f"{self.folder.name}/book", "http://server/v1")
        self.policy = Policy(ttl_s=TTL_S, return_s=50)
        self.book = Bookkeeping(rows, MODEL, self.policy, self.clock, CountingIds())
        self.knowledge = [Knowledge([{"role": "system", "content": str(n)}]) for n in range(self.n_knowledge)]
        self.workers, self.dead, self.sent = [], [], []

    def teardown(self):
        self.all_is_well_in_the_end()
        for steps in [worker.steps for worker in self.workers] + self.dead:
            steps.close()
        self.folder.cleanup()

    def go_on(self, worker, step):
        if isinstance(step, Call):
            worker.call = step
            self.workers.append(worker)
            return
        end(worker.steps)
        if step.cache_id is not None:
            assert self.server.contents[step.cache_id] == str(list(step.knowledge.messages))
            self.sent.append(step)

    def taken(self, data):
        return self.workers.pop(data.draw(st.integers(0, len(self.workers) - 1)))

    @precondition(lambda self: len(self.workers) < 5)
    @rule(data=st.data(), key=st.sampled_from(KEYS), form=st.sampled_from(Form), n_at_once=st.integers(1, 3))
    def ask(self, data, key, form, n_at_once):
        known = data.draw(st.sampled_from(self.knowledge))
        for _ in range(n_at_once):
            full = Sending(key, known, (), 0.0)
            steps = self.book.prepare(key, known, (), form)
            self.go_on(Worker(steps, known, self.clock.now(), full, None), advance(steps, None, full))

    @precondition(lambda self: self.workers)
    @rule(data=st.data(), fates=st.lists(FATES, min_size=1, max_size=6))
    def perform(self, data, fates):
        for drawn in fates[: len(self.workers)]:
            # An object whose creation nobody knows of ends by its lifetime when its knowledge is replaced.
            fate = drawn if self.n_knowledge == 1 else "done"
            worker = self.taken(data)
            if fate in ("done", "reply lost"):
                reply = self.server.perform(worker.call)
            if fate != "done":
                reply = Reply(429 if fate == "refused" else None)
            self.go_on(worker, advance(worker.steps, reply, worker.full))
            self.one_live_object_for_a_key_and_its_knowledge()

    @precondition(lambda self: self.workers and self.n_knowledge == 1)
    @rule(data=st.data(), carried_out=st.booleans(), killed=st.booleans())
    def stop(self, data, carried_out, killed):
        worker = self.taken(data)
        if carried_out:
            self.server.perform(worker.call)
        if killed:
            self.dead.append(worker.steps)  # kept, so that it cannot even clean up
        else:
            end(worker.steps)

    @rule(seconds=st.sampled_from([0.5, 2.0, 40.0, 40.0, 160.0, 350.0]))
    def wait(self, seconds):
        began = min((worker.began for worker in self.workers), default=self.clock.now())
        if self.clock.now() + seconds < began + CLAIM_S or not self.workers:  # no call takes as long as a claim lasts
            self.clock.advance(seconds)

    @precondition(lambda self: self.server.objects)
    @rule(data=st.data(), fate=st.sampled_from(["ready", "ready", "ready", "error", "deleted"]))
    def work(self, data, fate):
        cache_id = data.draw(st.sampled_from(sorted(self.server.objects)))
        if fate == "deleted":
            del self.server.objects[cache_id]
        elif self.server.objects[cache_id].status == "pending":
            self.server.objects[cache_id].status = fate

    @precondition(lambda self: self.sent)
    @rule(data=st.data(), other_model=st.booleans())
    def send(self, data, other_model):
        sending = self.sent.pop(data.draw(st.integers(0, len(self.sent) - 1)))
        cached = self.server.objects.get(sending.cache_id)
        if sending.form is Form.HEADERS:
            self.book.answered(sending, {HEADER_USED: sending.cache_id} if cached and self.server.live(cached) else {})
        elif cached is None or other_model:
            again = self.book.again(sending, 404 if cached is None else 400, "cache_not_found")
            assert again is not None
            assert again.messages == list(sending.knowledge.messages)
        else:
            if not self.server.live(cached):
                cached.status = "pending"
            cached.expires_at = self.clock.now() + sending.reset_ttl_s
            self.book.answered(sending, {})

    @invariant()
    def one_live_object_for_a_key_and_its_knowledge(self):
        marks = [cached.mark for cached in self.server.objects.values() if self.server.live(cached)]
        assert len(marks) == len(set(marks))

    def all_is_well_in_the_end(self):
        """Left alone, the book comes to a ready object with the next questions, whatever was before."""
        self.clock.advance(CLAIM_S + self.policy.retry_s + self.policy.return_s)
        for _ in range(8):
            for cached in self.server.objects.values():
                cached.status = "ready" if cached.status == "pending" else cached.status
            full = Sending("k", self.knowledge[0], (), 0.0)
            steps = self.book.prepare("k", self.knowledge[0], (), Form.MESSAGE)
            step = advance(steps, None, full)
            while isinstance(step, Call):
                step = advance(steps, self.server.perform(step), full)
            if step.cache_id is not None:
                assert step.cache_id in self.server.objects or self.server.contents[step.cache_id]
                return
            self.clock.advance(self.policy.retry_s)
        raise AssertionError("no object")


class TwoVersions(Books):
    n_knowledge = 2


@pytest.mark.parametrize("machine", [Books, TwoVersions], ids=["mishaps", "two versions"])
def test_workers_share_a_book(machine):
    run_state_machine_as_test(machine, settings=settings(max_examples=40, stateful_step_count=30))
