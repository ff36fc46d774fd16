"""The engine's loop over the scripted model: exactness, sharing, fairness, cancellation, pins."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keepwarm.core.errors import ErrorKind
from keepwarm.core.event import ChoiceFinished, Failed, Started
from keepwarm.core.prompt import OutputRules, Priority
from tests.unit.engine.conftest import Rig, tokens


def test_a_repeated_prompt_evaluates_the_last_two_tokens_only(rig):
    prompt = tokens(500)
    cold, usage = rig.run(prompt)
    assert (usage.fresh, usage.cache_read) == (500, 0)
    warm, usage = rig.run(prompt)
    assert (usage.fresh, usage.cache_read) == (2, 498)
    assert warm == cold
    assert cold


@pytest.mark.parametrize("g", [1, 8, 64])
@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_cold_warm_crowded_and_marked_runs_give_the_same_answer(g, data):
    n = data.draw(st.integers(3, 700))
    marks = sorted(data.draw(st.sets(st.integers(1, n), max_size=3)))
    fork = data.draw(st.integers(0, n))
    prompt = tokens(n, seed=data.draw(st.integers(0, 3)))
    other = prompt.copy()
    other[fork:] = tokens(n - fork, seed=9)
    expected, usage = Rig(g=g).run(prompt, marks=marks)
    assert usage.prompt == n
    rig = Rig(g=g, n_ubatch=data.draw(st.sampled_from([64, 128, 512])))
    rig.submit(other, marks=sorted(data.draw(st.sets(st.integers(1, n), max_size=3))))
    turn_id = rig.submit(prompt, marks=marks)
    rig.submit(tokens(300, seed=5))
    rig.drain()
    assert rig.answer(turn_id)[0] == expected
    again, usage = rig.run(prompt, marks=marks)
    assert again == expected
    assert usage.cache_read + usage.fresh == n


@pytest.mark.parametrize("g", [1, 8, 64])
def test_a_marked_prefix_is_read_to_its_last_token(g):
    rig = Rig(g=g)
    prefix, question = tokens(333), tokens(40, seed=1)
    rig.run(prefix, marks=[333], n_out=0, pin_id="object", write_end=333)
    _, usage = rig.run(np.concatenate([prefix, question]), marks=[333])
    assert (usage.cache_read, usage.fresh) == (333, 40)


def test_a_write_is_what_was_evaluated_up_to_write_end(rig):
    _, usage = rig.run(tokens(300), n_out=0, pin_id="object", marks=[300], write_end=300)
    assert (usage.cache_write, usage.fresh, usage.cache_read, usage.output) == (300, 0, 0, 0)
    _, usage = rig.run(tokens(300), n_out=0, pin_id="object", marks=[300], write_end=300)
    assert (usage.cache_write, usage.fresh, usage.cache_read) == (0, 0, 300)


def test_no_more_is_read_than_the_plan_allows_and_the_count_says_so():
    rig = Rig()
    prompt = tokens(500)
    expected, _ = rig.run(prompt, marks=[100, 300])
    for read_end, n_read in ((0, 0), (100, 100), (300, 300), (None, 498)):
        answer, usage = rig.run(prompt, marks=[100, 300], read_end=read_end, write_end=300, write_long_end=100)
        assert answer == expected
        assert usage.cache_read == n_read
        assert usage.cache_write == max(0, 300 - n_read)
        assert usage.cache_write_long == max(0, 100 - n_read)
        assert usage.prompt == 500


def test_another_tenant_never_hits_and_the_same_one_does(rig):
    rig.run(tokens(500), tenant="a")
    _, usage = rig.run(tokens(500), tenant="b")
    assert usage.cache_read == 0
    _, usage = rig.run(tokens(500), tenant="a")
    assert usage.cache_read == 498


def test_eight_turns_over_one_new_context_compute_it_once(rig):
    context = tokens(1000)
    prompts = [np.concatenate([context, tokens(20, seed=i + 1)]) for i in range(8)]
    alone = [Rig().run(prompt)[0] for prompt in prompts]
    turn_ids = [rig.submit(prompt) for prompt in prompts]
    rig.drain()
    assert [rig.answer(t)[0] for t in turn_ids] == alone
    assert rig.model.n_evaluated <= 1000 + 8 * 20 + 8


def test_a_donor_that_is_cancelled_does_not_strand_those_who_wait(rig):
    context = tokens(1500)
    first = rig.submit(context)
    second = rig.submit(np.concatenate([context, tokens(9, seed=2)]))
    for _ in range(3):
        rig.core.step()
    rig.core.cancel(first)
    rig.drain()
    _, usage = rig.answer(second)
    assert usage.cache_read >= 512  # what the first had evaluated
    assert not any(isinstance(e, ChoiceFinished) for e in rig.said[first])


@pytest.mark.parametrize("strict", [True])
def test_strict_decoding_is_the_same_in_any_company(strict):
    prompts = [tokens(60, seed=i) for i in range(8)]
    alone = Rig(strict=strict).run(prompts[0], n_out=20)[0]
    for n_others in (1, 3, 7):
        rig = Rig(strict=strict)
        turn_ids = [rig.submit(p, n_out=20) for p in prompts[: n_others + 1]]
        rig.drain()
        assert rig.answer(turn_ids[0])[0] == alone


def test_fast_decoding_batches_all_turns_into_one_call():
    rig = Rig(strict=False)
    calls = []
    decode = rig.model.decode
    rig.model.decode = lambda steps: (calls.append(len(steps)), decode(steps))[1]
    for i in range(4):
        rig.submit(tokens(60, seed=i), n_out=5)
    rig.drain()
    assert 4 in calls


def test_decode_steps_alternate_with_prefill_chunks_of_bounded_size(rig):
    rig.submit(tokens(60), n_out=50)
    while not any(r.phase.value == "decode" for r in rig.core._runs.values()):
        rig.core.step()
    rig.submit(tokens(2000, seed=3), n_out=1)
    kinds = []
    evaluate, decode = rig.model.evaluate, rig.model.decode
    rig.model.evaluate = lambda *a, **k: (kinds.append("p"), evaluate(*a, **k))[1]
    rig.model.decode = lambda steps: (kinds.append("d"), decode(steps))[1]
    rig.drain()
    assert "pp" not in "".join(kinds).split("d" * 3)[0][:8]


def test_tenants_share_streams_fairly():
    rig = Rig(n_streams=2)
    greedy = [rig.submit(tokens(100, seed=i), tenant="greedy", n_out=3) for i in range(6)]
    modest = rig.submit(tokens(100, seed=50), tenant="modest", n_out=3)
    started = []
    while rig.core.step():
        started += [t for t in rig.said if any(isinstance(e, Started) for e in rig.said[t]) and t not in started]
    assert started.index(modest) <= 2
    assert started[:1] == greedy[:1]


def test_a_short_question_overtakes_a_long_document(rig):
    long = rig.submit(tokens(1900), n_out=1)
    rig.core.step()
    rig.core.step()
    short = rig.submit(tokens(40, seed=4), n_out=1)
    ends = []
    while rig.core.step():
        ends += [t for t in (long, short) if any(isinstance(e, ChoiceFinished) for e in rig.said[t]) and t not in ends]
    assert ends == [short, long]


def test_idle_work_gives_way_and_keeps_what_it_did(rig):
    idle = rig.submit(tokens(1900), n_out=0, priority=Priority.IDLE)
    rig.core.step()
    rig.core.step()
    front = rig.submit(tokens(30, seed=8), n_out=2)
    rig.drain()
    assert rig.answer(idle)[1].fresh == 512
    rig.answer(front)
    _, usage = rig.run(tokens(1900))
    assert usage.cache_read == 512


def test_cancelling_at_every_step_leaks_nothing():
    for at in range(12):
        rig = Rig()
        victim = rig.submit(tokens(900), n_out=6)
        rig.submit(tokens(900), n_out=6)
        for _ in range(at):
            rig.core.step()
        rig.core.cancel(victim)
        rig.drain()
        assert rig.core.n_running == rig.core.n_queued == 0
        assert len(rig.core._free) == 8


def test_an_object_that_does_not_fit_fails_and_evicts_no_pin():
    rig = Rig(blocks=10)
    rig.run(tokens(8 * 64), n_out=0, pin_id="one", marks=[8 * 64], write_end=512)
    turn_id = rig.submit(tokens(5 * 64, seed=1), n_out=0, pin_id="two", marks=[5 * 64])
    rig.drain()
    failed = rig.said[turn_id][-1]
    assert isinstance(failed, Failed)
    assert failed.kind is ErrorKind.OVERLOADED
    assert f"{5 * rig.tier.slot_bytes:,} bytes" in failed.message
    for i in range(5):
        rig.run(tokens(400, seed=20 + i))
    _, usage = rig.run(tokens(8 * 64 + 10)[: 8 * 64], n_out=1)
    assert usage.cache_read == 8 * 64 - 2
    rig.core.drop("one")
    rig.run(tokens(5 * 64, seed=1), n_out=0, pin_id="two", marks=[5 * 64])
    rig.core.check_integrity()


def test_a_store_too_small_for_the_prompt_still_answers():
    rig = Rig(blocks=3)
    expected = Rig().run(tokens(900))[0]
    assert rig.run(tokens(900))[0] == expected
    text, usage = rig.run(tokens(900))
    assert text == expected
    assert usage.cache_read == 3 * 64


def test_too_long_a_prompt_is_one_failed_event(rig):
    turn_id = rig.submit(tokens(2041), n_out=8)
    assert [type(e) for e in rig.said[turn_id]] == [Failed]
    assert "2,041" in rig.said[turn_id][0].message


def test_a_refused_grammar_fails_the_turn_alone(rig):
    plan = rig.plan(tokens(50))
    bad = plan.__class__(
        **{f: getattr(plan, f) for f in plan.__struct_fields__} | {"output": OutputRules(5, grammar="x")}
    )
    rig.core.submit(bad)
    assert rig.said[plan.turn_id][-1].kind is ErrorKind.INVALID_REQUEST
    rig.run(tokens(50))


def test_reuse_and_store_can_be_forbidden(rig):
    rig.run(tokens(300), store=False)
    assert rig.run(tokens(300))[1].cache_read == 0
    assert rig.run(tokens(300), reuse=False)[1].cache_read == 0
    assert rig.run(tokens(300))[1].cache_read == 298


@pytest.mark.parametrize("g", [1, 8, 64])
def test_an_assembled_state_is_used_again_only_for_what_it_begins_with(g):
    """Turns over one context, then over another, then over forks of both: each as if it ran alone."""
    contexts = [tokens(400, seed=1), tokens(400, seed=2)]
    questions = [tokens(30, seed=10 + i) for i in range(4)]
    order = [(0, 0), (0, 1), (0, 0), (1, 2), (0, 3), (1, 1), (1, 2), (0, 2)]
    rig = Rig(g=g)
    for context, question in order:
        for cut_at in (400, 250):
            prompt = np.concatenate([contexts[context][:cut_at], questions[question]])
            marks = [cut_at] if cut_at == 400 else []
            assert rig.run(prompt, marks=marks)[0] == Rig(g=g).run(prompt, marks=marks)[0]


def test_arriving_turns_do_not_hold_up_decoding():
    rig = Rig()
    rig.submit(tokens(60), n_out=400)
    while not rig.core.counters.decoded:
        rig.core.step()
    calls = []
    evaluate, decode = rig.model.evaluate, rig.model.decode
    rig.model.evaluate = lambda *a, **k: (calls.append("p"), evaluate(*a, **k))[1]
    rig.model.decode = lambda steps: (calls.append("d"), decode(steps))[1]
    for i in range(6):  # each is admitted and evaluated in one chunk
        rig.submit(tokens(20, seed=i + 1), n_out=0, tenant=str(i))
        rig.core.step()
        rig.core.step()
    assert "pp" not in "".join(calls), calls


def test_a_prompt_of_one_token_does_not_change_the_answer_of_longer_ones():
    prompt = tokens(40)
    expected, _ = Rig().run(prompt)
    rig = Rig()
    rig.run(prompt[:1])  # a row evaluated alone has other bits
    assert rig.run(prompt)[0] == expected


def test_a_block_that_the_assembled_state_has_in_part_is_copied_again(rig):
    """A's state is assembled, then the beginning of B's last block written into it, then all of that block is wanted."""
    first, second = tokens(500, seed=1), tokens(500, seed=1)
    second[448:] = tokens(52, seed=2)
    fork = np.concatenate([second[:470], tokens(30, seed=3)])
    expected = Rig().run(second)[0]
    for prompt in (first, second, first, first, fork):
        rig.run(prompt)
    text, usage = rig.run(second)
    assert usage.cache_read == 498
    assert text == expected
