"""A core over the scripted model, and a collector of its events."""

from collections import defaultdict

import numpy as np
import pytest

from keepwarm.core.clock import SystemClock
from keepwarm.core.event import Failed, Finished, Started, TextDelta
from keepwarm.core.prompt import OutputRules, Plan, Prompt
from keepwarm.core.request import Sampling
from keepwarm.engine.core import CoreSettings, EngineCore
from keepwarm.engine.scripted import ScriptedModel
from keepwarm.engine.selftest import layout_of
from keepwarm.engine.store import PrefixStore, slot_bytes
from keepwarm.engine.tiers import HostTier

GREEDY = Sampling(temperature=0.0)


class Rig:
    """An engine core in this thread, its store, and what it said."""

    def __init__(self, *, g=1, n_streams=8, n_ctx=2048, blocks=400, strict=True, delay_ms=250.0, n_ubatch=512):
        self.model = ScriptedModel(n_streams=n_streams, n_ctx=n_ctx, n_ubatch=n_ubatch, granularity=g)
        layout = layout_of(self.model)
        self.model.n_evaluated = 0
        for stream in range(n_streams):
            self.model.forget(stream, 0, -1)
        self.tier = HostTier(blocks * slot_bytes(layout), slot_bytes(layout))
        self.store = PrefixStore(layout, self.tier, identity=("m",), granularity=g, n_ctx=n_ctx)
        self.said = defaultdict(list)
        self.steps_at = {}
        self.core = EngineCore(
            self.model,
            self.store,
            CoreSettings(strict, delay_ms),
            emit=self._hear,
            clock=SystemClock(),
            seeds=lambda: 7,
            later=lambda call: call(),
        )
        self.n = 0

    def _hear(self, events):
        for turn_id, event in events:
            said = self.said[turn_id]
            assert not any(isinstance(e, Finished | Failed) for e in said), "an event after the terminal one"
            said.append(event)

    def plan(self, tokens, *, marks=(), tenant="a", n_out=8, **more):
        self.n += 1
        prompt = Prompt(tenant, np.asarray(tokens, np.int32), tuple(marks))
        return Plan(f"t{self.n}", prompt, OutputRules(n_out), sampling=GREEDY, **more)

    def submit(self, *args, **kwargs):
        plan = self.plan(*args, **kwargs)
        self.core.submit(plan)
        return plan.turn_id

    def drain(self, steps_max=100_000):
        for _ in range(steps_max):
            if not self.core.step():
                break
        self.core.check_integrity()

    def run(self, *args, **kwargs):
        """One turn alone, to its end: (text, usage)."""
        turn_id = self.submit(*args, **kwargs)
        self.drain()
        return self.answer(turn_id)

    def answer(self, turn_id):
        said = self.said[turn_id]
        assert isinstance(said[-1], Finished), said
        assert isinstance(said[0], Started)
        return "".join(e.text for e in said if isinstance(e, TextDelta)), said[-1].usage


@pytest.fixture
def rig():
    return Rig()


def tokens(n, seed=0):
    return np.random.default_rng(seed).integers(97, 122, n).astype(np.int32)
