"""The compute thread's work: turns in, events out, one action at a time (scheduler.py decides, this file does).

    submit → QUEUED → (WAITING) → restore → PREFILL chunk … → first token → DECODE step … → end: events, then store

Every turn that was submitted gets exactly one terminal event, unless it was cancelled, which gives everything back and
says nothing. State at rest is in the prefix store; a stream's cells live only as long as its turn.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from msgspec import Struct

from keepwarm.core.clock import Clock
from keepwarm.core.errors import ErrorKind
from keepwarm.core.event import (
    ChoiceFinished,
    Event,
    Failed,
    Finished,
    FinishReason,
    Started,
    Timings,
    TokenLogprob,
    Usage,
)
from keepwarm.core.prompt import Plan, Prompt, common_prefix
from keepwarm.engine.chunks import Piece, level_rows, next_rows, pieces, usable
from keepwarm.engine.model import DecodeStep, GrammarFault, Model, ModelFault, Sampler
from keepwarm.engine.output import OutputReader
from keepwarm.engine.reuse import Match, Store
from keepwarm.engine.scheduler import Abandon, Admit, Decode, Pace, Phase, Prefill, View, decide, rows_within
from keepwarm.engine.snapshot_index import cut_at
from keepwarm.engine.store import NoRoom
from keepwarm.engine.tiers import TierFault, TierFull

SEED_MASK = 0xFFFFFFFF  # llama.cpp's random source takes 32 bits
SHARE_TOKENS_MIN = 64  # waiting for another turn's prefix pays from one block on
UNREAD_TOKENS_MAX = 512  # a turn among others is admitted when this much or less is still to come from the disk

Later = Callable[[Callable[[], None]], None]  # calls something on the compute thread, from any thread

Emit = Callable[[Sequence[tuple[str, Event]]], None]


class CoreSettings(Struct, frozen=True):
    """Sizes and choices that the start-up measurements fixed. `strict`: every decode step in a one-stream ubatch."""

    strict: bool
    prefill_delay_ms: float


class Counters(Struct):
    """Tokens since the start of the process."""

    evaluated: int = 0
    restored: int = 0
    decoded: int = 0
    save_faults: int = 0  # turns whose prompt could not be stored afterwards


class Run:
    """One turn on its way through the engine."""

    def __init__(self, plan: Plan, parts: tuple[Piece, ...], points: tuple[int, ...], now: float) -> None:
        self.plan, self.parts, self.points = plan, parts, points
        self.chunked = parts  # what prefill follows: the pieces, cut where it stops to save
        self.reader = OutputReader(plan.output)
        self.phase = Phase.QUEUED
        self.stream: int | None = None
        self.sampler: Sampler | None = None
        self.pos = 0  # tokens in the stream
        self.n_read = 0
        self.n_output = 0
        self.token = 0  # sampled, not evaluated yet
        self.passed_over = 0
        self.waits_for: str | None = None
        self.waits_until = 0
        self.held: Match | None = None  # while it waits for the disk
        self.arrived = now
        self.queue_s = self.lookup_s = self.restore_s = self.evaluate_s = self.decode_s = 0.0

    @property
    def prompt(self) -> Prompt:
        return self.plan.prompt

    @property
    def n_prompt(self) -> int:
        return self.plan.prompt.n_tokens

    @property
    def n_evaluated(self) -> int:
        """Prompt tokens whose cells are in the stream."""
        return min(self.pos, self.n_prompt)

    def view(self) -> View:
        """What the scheduler may see."""
        plan = self.plan
        return View(
            plan.turn_id, plan.prompt.tenant, self.phase, plan.priority, self.n_prompt - self.pos, self.passed_over
        )

    def usage(self) -> Usage:
        """Counts up to now; a turn cut short in prefill is counted for what was done."""
        return self._usage(self.n_evaluated)

    def prompt_usage(self) -> Usage:
        """What the prompt comes to once all of it is evaluated."""
        return self._usage(self.n_prompt)

    def _usage(self, n_evaluated: int) -> Usage:
        written, long = (
            max(0, min(end, n_evaluated) - self.n_read) for end in (self.plan.write_end, self.plan.write_long_end)
        )
        return Usage(n_evaluated - self.n_read - written, self.n_read, written, self.n_output, min(long, written))

    def timings(self) -> Timings:
        parts = (self.queue_s, self.lookup_s, self.restore_s, self.evaluate_s, self.decode_s)
        return Timings(*(round(seconds * 1000, 3) for seconds in parts))


class EngineCore:
    """Owns the model's streams. All methods belong to the compute thread. `store` None: caching is off."""

    def __init__(
        self,
        model: Model,
        store: Store[Any] | None,
        settings: CoreSettings,
        *,
        emit: Emit,
        clock: Clock,
        seeds: Callable[[], int],
        later: Later,
    ) -> None:
        self._model, self._store, self._settings = model, store, settings
        self._emit, self._clock, self._seeds, self._later = emit, clock, seeds, later
        self._runs: dict[str, Run] = {}
        self._free = list(range(model.n_streams))
        self._events: list[tuple[str, Event]] = []
        self._prefilled_last = False
        self._ms_per_row: float | None = None
        self.counters = Counters()

    @property
    def n_running(self) -> int:
        return self._model.n_streams - len(self._free)

    @property
    def n_queued(self) -> int:
        return len(self._runs) - self.n_running

    def submit(self, plan: Plan) -> None:
        """Take a turn. A grammar that llama.cpp refuses, or a prompt too long, fails it at once."""
        n_needed = plan.prompt.n_tokens + plan.output.max_tokens
        if plan.prompt.n_tokens == 0 or n_needed > self._model.n_ctx:
            message = (
                f"prompt has {plan.prompt.n_tokens:,} tokens and max_tokens is {plan.output.max_tokens:,}; "
                f"the engine's window is {self._model.n_ctx:,}"
            )
            self._tell(plan.turn_id, Failed(ErrorKind.PROMPT_TOO_LONG, message))
            self._flush()
            return
        if plan.pin_id is not None and self._store:
            try:
                self._store.check_room(plan.prompt)
            except NoRoom as exc:  # before anything is computed, and nothing is evicted
                self._tell(plan.turn_id, Failed(ErrorKind.OVERLOADED, _no_room(exc)))
                self._flush()
                return
        granularity = self._store.granularity if self._store else 1
        parts = pieces(plan.prompt.n_tokens, plan.prompt.marks, granularity)
        points = self._store.snapshot_points(plan.prompt) if self._store and plan.store else ()
        run = Run(plan, parts, points, self._clock.monotonic())
        if plan.output.max_tokens:
            seed = self._seeds() if plan.sampling.seed is None else plan.sampling.seed & SEED_MASK
            try:
                run.sampler = self._model.sampler(plan.sampling, plan.output.grammar, seed)
            except GrammarFault as exc:
                self._tell(plan.turn_id, Failed(ErrorKind.INVALID_REQUEST, str(exc)))
                self._flush()
                return
        self._runs[plan.turn_id] = run

    def cancel(self, turn_id: str) -> None:
        """The turn's reader is gone: keep what was evaluated, give the rest back, tell the counts.

        An unknown id is no error: that run has told its end already.
        """
        run = self._runs.get(turn_id)
        if run is not None:
            usage = run.usage()
            self._leave(run)
            self._tell(turn_id, Failed(ErrorKind.CLIENT_CLOSED, "the turn was cancelled", usage))
            self._flush()

    def drop(self, pin_id: str) -> None:
        """End a cache object's lease."""
        if self._store:
            self._store.unpin(pin_id)

    def step(self) -> bool:
        """Do one thing; False when there is nothing to do."""
        self._wake()
        pace = Pace(
            self._model.n_ubatch,
            rows_within(self._settings.prefill_delay_ms, self._ms_per_row, self._model.n_ubatch),
        )
        views = [run.view() for run in self._runs.values()]
        action = decide(views, len(self._free), pace, prefilled_last=self._prefilled_last)
        if isinstance(action, Prefill | Decode):  # an admission between two chunks does not make them less in a row
            self._prefilled_last = isinstance(action, Prefill)
        match action:
            case Admit(turn_id):
                self._guarded([self._runs[turn_id]], self._admit)
            case Prefill(turn_id, rows_max):
                run = self._runs[turn_id]
                self._guarded([run], lambda runs: self._prefill(runs, rows_max))
            case Decode(turn_ids):
                self._decode([self._runs[turn_id] for turn_id in turn_ids])
            case Abandon(turn_ids):
                for turn_id in turn_ids:
                    self._end(self._runs[turn_id], "length")
            case None:
                return False
        self._flush()
        return True

    def _tell(self, turn_id: str, *events: Event) -> None:
        self._events.extend((turn_id, event) for event in events)

    def _flush(self) -> None:
        if self._events:
            events, self._events = self._events, []
            self._emit(events)

    def _guarded(self, runs: list[Run], work: Callable[[list[Run]], None]) -> None:
        """A fault of the model fails these turns; the engine goes on."""
        try:
            work(runs)
        except ModelFault as exc:
            for run in [run for run in runs if run.plan.turn_id in self._runs]:  # some may have ended before the fault
                self._fail(run, Failed(ErrorKind.INTERNAL, f"the model could not go on: {exc}", run.usage()))

    # --- admission: look up, wait for a donor, restore

    def _admit(self, runs: list[Run]) -> None:
        (run,) = runs
        begin = self._clock.monotonic()
        held = self._look_up(run)
        if run.phase is Phase.WAITING:
            return
        looked_up = self._clock.monotonic()
        run.queue_s += begin - run.arrived
        run.lookup_s += looked_up - begin
        run.n_read = run.pos = held.n_tokens if held else 0
        try:
            # A lease is taken of what was read and verified just now, so a damaged block is computed again, not leased.
            wanted = run.plan.output.max_tokens > 0 or run.pos < run.n_prompt or run.plan.pin_id is not None
            if wanted:
                run.stream = self._free.pop(0)
                self._model.forget(run.stream, 0, -1)
                if held and held.n_tokens and self._store:
                    run.n_read = run.pos = self._store.restore(held, self._model, run.stream)
        finally:
            if held and self._store:
                self._store.release(held)
        run.restore_s += self._clock.monotonic() - looked_up
        self.counters.restored += run.n_read
        tier = held.tier if held and run.n_read else None
        n_found = held.n_found if held else 0
        self._tell(run.plan.turn_id, Started(run.n_prompt, run.n_read, tier, run.prompt_usage(), n_found=n_found))
        run.phase = Phase.PREFILL
        run.chunked = cut_at(run.parts, run.points, run.pos)
        if run.pos == run.n_prompt and not run.plan.output.max_tokens:
            self._end(run, "stop")

    def _look_up(self, run: Run) -> Match | None:
        """The usable prefix, locked; or the run is made to wait for a turn that is computing more of it."""
        if not (self._store and run.plan.reuse):
            return None
        if run.held is not None:  # it waited for the disk
            waited, run.held = run.held, None
            return waited
        want_logits = run.plan.output.max_tokens > 0
        held: Match = self._store.hold(run.prompt, want_logits=want_logits, end=run.plan.read_end)
        if self._has_company(run) and self._store.n_unread(held) > UNREAD_TOKENS_MAX:
            run.phase, run.held = Phase.WAITING, held
            return None
        donor, n_shared = self._donor(run, held.n_tokens + SHARE_TOKENS_MIN, want_logits=want_logits)
        if donor is not None:
            self._store.release(held)
            if donor.pos < n_shared:
                run.phase, run.waits_for, run.waits_until = Phase.WAITING, donor.plan.turn_id, n_shared
                return None
            assert donor.stream is not None
            self._store.save(donor.prompt, donor.n_evaluated, self._model, donor.stream, spend=False, pin=None)
            held = self._store.hold(run.prompt, want_logits=want_logits, end=run.plan.read_end)
        return held

    def _has_company(self, run: Run) -> bool:
        """Whether other turns would have to wait while this one's blocks come from the disk."""
        return any(other is not run and other.stream is not None for other in self._runs.values())

    def _donor(self, run: Run, n_min: int, *, want_logits: bool) -> tuple[Run | None, int]:
        """The turn on a stream that shares the longest prefix of at least `n_min` tokens with `run`, of the same tenant."""
        assert self._store
        best, best_n = None, n_min - 1
        for other in self._runs.values():
            if other.stream is None or not other.plan.store or other.prompt.tenant != run.prompt.tenant:
                continue
            n = common_prefix(other.prompt.tokens, run.prompt.tokens)
            n = n if run.plan.read_end is None else min(n, run.plan.read_end)
            n = usable(n, run.parts, self._store.granularity, want_logits=want_logits)
            if n > best_n and self._store.n_missing(other.prompt, n):
                best, best_n = other, n
        return best, best_n

    def _wake(self) -> None:
        for run in self._runs.values():
            if run.phase is Phase.WAITING and run.held is not None:
                if not self._has_company(run) or not self._store or self._store.n_unread(run.held) <= UNREAD_TOKENS_MAX:
                    run.phase = Phase.QUEUED
            elif run.phase is Phase.WAITING:
                donor = self._runs.get(run.waits_for or "")
                if donor is None or donor.pos >= run.waits_until:
                    run.phase, run.waits_for = Phase.QUEUED, None

    # --- prefill and decode

    def _prefill(self, runs: list[Run], rows_max: int) -> None:
        (run,) = runs
        assert run.stream is not None
        granularity = self._store.granularity if self._store else 1
        begin = self._clock.monotonic()
        rows_max = level_rows(run.pos, run.n_prompt, rows_max)
        rows = next_rows(run.pos, run.chunked, granularity, rows_max)
        last = run.pos + rows == run.n_prompt
        want_logits = last and run.plan.output.max_tokens > 0
        self._model.evaluate(run.stream, run.prompt.tokens[run.pos : run.pos + rows], run.pos, want_logits=want_logits)
        spent = self._clock.monotonic() - begin
        self._ms_per_row = spent * 1000 / rows
        if self._store:
            self._store.speeds.observe_prefill(rows, run.pos, spent)
        run.pos += rows
        if self._store and run.pos in run.points:  # later it cannot be taken out of the state any more
            write_end = run.plan.write_end
            self._store.save(run.prompt, run.pos, self._model, run.stream, spend=False, pin=None, write_end=write_end)
        run.evaluate_s += spent
        self.counters.evaluated += rows
        run.passed_over = 0
        for other in self._runs.values():
            other.passed_over += other is not run and other.phase is Phase.PREFILL
        if last and not want_logits:
            self._end(run, "stop")
        elif last:
            run.phase = Phase.DECODE
            self._sample(run, -1)

    def _decode(self, runs: list[Run]) -> None:
        if self._settings.strict:
            for run in runs:
                self._guarded([run], self._decode_together)
        else:
            self._guarded(runs, self._decode_together)

    def _decode_together(self, runs: list[Run]) -> None:
        begin = self._clock.monotonic()
        runs = sorted(runs, key=lambda r: r.stream or 0)  # contiguous streams share a ubatch
        self._model.decode([DecodeStep(run.stream or 0, run.token, run.pos) for run in runs])
        self.counters.decoded += len(runs)
        for row, run in enumerate(runs):
            run.pos += 1
            self._sample(run, row)
        spent = self._clock.monotonic() - begin
        for run in runs:
            run.decode_s += spent

    def _sample(self, run: Run, row: int) -> None:
        assert run.sampler
        token = run.token = run.sampler.sample(row)
        run.n_output += 1
        if self._model.is_end(token):
            self._end(run, "stop")
            return
        logprob = self._logprob(run, row, token) if run.plan.output.top_logprobs is not None else None
        deltas, stop = run.reader.feed(self._model.piece(token), logprob)
        self._tell(run.plan.turn_id, *deltas)
        if stop is not None:
            self._end(run, "stop", stop)
        elif run.n_output >= run.plan.output.max_tokens:
            self._end(run, "length")

    def _logprob(self, run: Run, row: int, token: int) -> TokenLogprob:
        logits = self._model.logits(row).astype(np.float64)
        top_logit = logits.max()
        norm = top_logit + float(np.log(np.exp(logits - top_logit).sum()))
        n_top = run.plan.output.top_logprobs or 0
        best = np.argsort(-logits, kind="stable")[:n_top] if n_top else ()
        top = tuple((self._model.piece(int(i)), float(logits[i] - norm)) for i in best)
        return TokenLogprob(self._model.piece(token), float(logits[token] - norm), top)

    # --- the end of a turn

    def _end(self, run: Run, reason: FinishReason, stop: str | None = None) -> None:
        """The turn is complete: lease if an object asked for it, tell, then store what is new."""
        pin = run.plan.pin_id
        if pin is not None and run.n_evaluated == run.n_prompt:
            self._lease(run, pin, reason)
            return
        self._tell_end(run, reason, stop)
        self._leave(run)

    def _tell_end(self, run: Run, reason: FinishReason, stop: str | None = None) -> None:
        turn_id = run.plan.turn_id
        self._tell(turn_id, *run.reader.finish())
        if reason == "stop" and run.reader.saw_tool_call:
            reason = "tool_calls"
        self._tell(turn_id, ChoiceFinished(reason, run.n_output, stop=stop), Finished(run.usage(), run.timings()))
        self._flush()

    def _lease(self, run: Run, pin: str, reason: FinishReason) -> None:
        """Keep the prompt for a cache object. The turn ends when all of it is durable; its stream is free before that."""
        if not self._store:
            self._fail(run, Failed(ErrorKind.OVERLOADED, "caching is off: this model is not exact here", run.usage()))
            return
        try:
            assert run.stream is not None
            self._store.save(run.prompt, run.n_prompt, self._model, run.stream, spend=True, pin=pin)
        except NoRoom as exc:
            self._fail(run, Failed(ErrorKind.OVERLOADED, _no_room(exc), run.usage()))
            return
        self._give_stream_back(run)
        run.phase = Phase.STORING
        self._store.make_durable(pin, lambda fault: self._later(lambda: self._leased(run, reason, fault)))

    def _leased(self, run: Run, reason: FinishReason, fault: TierFull | TierFault | None) -> None:
        """The lease is durable, or cannot be."""
        turn_id = run.plan.turn_id
        pin = run.plan.pin_id
        if fault is not None and self._store and pin is not None:
            self._store.unpin(pin)
        if self._runs.get(turn_id) is not run:
            return  # cancelled meanwhile: the lease, if it came to be, is its owner's to drop
        if fault is not None:
            message = f"this cache could not be written to disk: {fault}"
            self._fail(run, Failed(ErrorKind.OVERLOADED, message, run.usage()))
            return
        self._tell_end(run, reason)
        self._release(run)

    def _fail(self, run: Run, failed: Failed) -> None:
        self._tell(run.plan.turn_id, failed)
        self._flush()
        self._release(run)

    def _leave(self, run: Run) -> None:
        if run.stream is not None and self._store and run.plan.store and run.n_evaluated > run.n_read:
            try:
                self._store.save(
                    run.prompt, run.n_evaluated, self._model, run.stream, spend=True, pin=None,
                    write_end=run.plan.write_end,
                )  # fmt: skip
            except ModelFault:  # the answer is out; the next turn over this prompt misses
                self.counters.save_faults += 1
        self._release(run)

    def _release(self, run: Run) -> None:
        del self._runs[run.plan.turn_id]
        if run.sampler:
            run.sampler.close()
        if run.held is not None and self._store:
            self._store.release(run.held)
            run.held = None
        self._give_stream_back(run)

    def _give_stream_back(self, run: Run) -> None:
        if run.stream is not None:
            self._model.forget(run.stream, 0, -1)
            self._free.append(run.stream)
            self._free.sort()  # low ids first: contiguous streams share a ubatch in fast decoding
            run.stream = None

    def check_integrity(self) -> None:
        """Assert that streams are held by exactly the turns that say so."""
        held = [run.stream for run in self._runs.values() if run.stream is not None]
        assert sorted(held + self._free) == list(range(self._model.n_streams))
        if self._store:
            self._store.check_integrity()

    @property
    def n_live_tokens(self) -> int:
        """Tokens in running turns' streams."""
        return sum(run.pos for run in self._runs.values() if run.stream is not None)


def _no_room(exc: NoRoom) -> str:
    return (
        f"no room to keep this cache: it needs {exc.n_bytes_needed:,} bytes more, {exc.n_bytes_free:,} are free or can be "
        "freed"
    )
