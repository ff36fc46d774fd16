"""Limits and money through HTTP: the worked examples to the last nano, refusals, disconnects, repeats, cache objects."""

import asyncio
import threading
from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from keepwarm.billing.budget import Budget, Period, Scope
from keepwarm.core.clock import RandomIds
from keepwarm.core.errors import ErrorKind
from keepwarm.core.event import Event, Failed, Started, TextDelta, Usage
from keepwarm.core.identity import NewKey, OrganisationChange
from keepwarm.core.prompt import Plan
from keepwarm.core.rate_limit import LimitOverrides
from keepwarm.gateway.identities import Identities
from keepwarm.storage import Storage, database_path
from keepwarm.tables import cache_objects, ledger_rows
from tests.engines import StepEngine
from tests.paid import NANO, paid, text_of, used
from tests.world import CONFIG, until


async def test_minimax_worked_example(tmp_path: Path) -> None:
    async with paid(tmp_path) as at:
        text = await text_of(at.server, at.key, 50_000, "minimax")
        at.server.engine.script = used(Usage(5_000, 45_000, 0, 1_000), "ok")
        path = "/minimax/v1/chat/completions"
        answer = await at.ask("minimax", text, path=path, max_tokens=1_000)
        assert answer.status == 200
        assert await at.balanced() == Decimal("0.135") * NANO
        (row,) = await at.rows("settle")
        assert row.uncached_nano == Decimal("0.54") * NANO
        assert (row.n_fresh, row.n_read, row.n_write, row.n_output) == (5_000, 45_000, 0, 1_000)
        assert (row.status, row.dialect, row.model, row.sheet) == ("finished", "minimax", "minimax", "minimax@2026")
        (hold,) = await at.rows("hold")
        assert hold.held_nano >= Decimal("0.54") * NANO  # all of it might have been fresh


async def test_kimis_worked_example_of_an_object_for_ten_minutes_and_five_calls(tmp_path: Path) -> None:
    async with paid(tmp_path) as at:
        server = at.server
        trial = await server.create_cache("x" * 100, key=at.key, model="kimi", ttl=600)
        made = await server.settled(trial["id"], key=at.key)
        await server.request("DELETE", f"/v1/caching/{trial['id']}", key=at.key)
        before = await at.balanced()
        n_more = 100_000 - made["tokens"]
        created = await server.create_cache("x" * (100 + n_more), key=at.key, model="kimi", ttl=600)
        made = await server.settled(created["id"], key=at.key)
        assert (made["tokens"], made["status"]) == (100_000, "ready")
        for _ in range(5):
            server.engine.script = used(Usage(0, 100_000, 0, 0), "")
            body = {
                "model": "kimi",
                "messages": [{"role": "cache", "content": f"cache_id={made['id']}"}, {"role": "user", "content": "?"}],
                "max_tokens": 1,
            }
            assert (await server.request("POST", "/v1/chat/completions", body, key=at.key)).status == 200
        for _ in range(20):  # over its end, in ticks of half a minute and more
            server.clock.advance(37.0)
            await server.running.paying.tick()
        by_kind = {kind: sum(row.cash_nano for row in await at.rows(kind)) for kind in ("settle",)}
        assert by_kind["settle"] == -Decimal("0.1") * NANO
        rows = [row for row in await at.rows("creation", "storage") if row.object_id == made["id"]]
        assert sum(row.creation_nano for row in rows if row.kind == "creation") == Decimal("2.4") * NANO
        assert sum(row.storage_nano for row in rows if row.kind == "storage") == 10 * NANO
        assert await at.balanced() - before == Decimal("12.5") * NANO


async def test_geminis_token_hours_and_discounted_reads(tmp_path: Path) -> None:
    async with paid(tmp_path) as at:
        server = at.server
        body = {
            "model": "models/gemini",
            "contents": [{"role": "user", "parts": [{"text": "x" * 9_000}]}],
            "ttl": "5400s",
        }
        created = (await server.request("POST", "/v1beta/cachedContents", body, key=at.key)).json()
        n_tokens = created["usageMetadata"]["totalTokenCount"]
        server.engine.script = used(Usage(10, n_tokens, 0, 20), "ok")
        ask = {"contents": [{"role": "user", "parts": [{"text": "?"}]}], "cachedContent": created["name"]}
        path = "/v1beta/models/gemini:generateContent"
        answer = await server.request("POST", path, ask, key=at.key)
        assert answer.json()["usageMetadata"]["cachedContentTokenCount"] == n_tokens
        server.clock.advance(1800.0)
        await server.running.paying.tick()
        server.clock.advance(7200.0)
        await server.running.paying.tick()
        million = 10**6
        making = Decimal(n_tokens) * Decimal("1.25") / million
        keeping = Decimal(n_tokens) * Decimal("4.5") / million * Decimal("1.5")
        call = (10 * Decimal("1.25") + n_tokens * Decimal("0.125") + 20 * Decimal(10)) / million
        parts = [round(amount * NANO) for amount in (making, keeping, call)]
        assert abs(await at.balanced() - sum(parts)) <= 2  # classes are rounded one by one
        assert sum(row.n_units for row in await at.rows("storage")) == 5400


async def test_anthropics_writes_of_two_lifetimes_and_reads(tmp_path: Path) -> None:
    async with paid(tmp_path) as at:
        usage = Usage(fresh=50, cache_read=100_000, cache_write=3_000, output=200, cache_write_long=1_000)
        at.server.engine.script = used(usage, "ok")
        text = await text_of(at.server, at.key, usage.prompt, "claude")
        body = {"model": "claude", "max_tokens": 200, "messages": [{"role": "user", "content": text}]}
        answer = await at.server.request("POST", "/anthropic/v1/messages", body, key=at.key)
        told = answer.json()["usage"]
        assert (
            told["input_tokens"] + told["cache_read_input_tokens"] + told["cache_creation_input_tokens"] == usage.prompt
        )
        expected = 50 * 3_000 + 100_000 * 300 + 2_000 * 3_750 + 1_000 * 6_000 + 200 * 15_000
        assert await at.balanced() == expected


async def test_a_model_without_prices_is_recorded_and_costs_nothing(tmp_path: Path) -> None:
    async with paid(tmp_path) as at:
        assert (await at.ask("small", "hello")).status == 200
        (row,) = await at.rows()
        assert (row.kind, row.sheet, row.currency, row.fresh_nano, row.cash_nano) == ("settle", None, None, None, 0)
        assert row.n_output == 1


async def test_a_prepaid_organisation_is_refused_before_the_engine_and_nothing_is_held(tmp_path: Path) -> None:
    async with paid(tmp_path, prepaid=True) as at:
        answer = await at.ask("kimi", "hello")
        assert answer.status in (403, 429)
        assert answer.json()["error"]["type"] == "exceeded_current_quota_error"
        assert at.server.engine.plans == []
        await at.server.running.ledger.grant("acme", "CNY", NANO)
        assert (await at.ask("kimi", "hello", max_tokens=10)).status == 200
        at.server.assert_clean()
        assert await at.balanced() == (await at.rows("settle"))[0].fresh_nano + 12_000 - NANO


async def test_parallel_turns_on_one_budget_never_pass_it(tmp_path: Path) -> None:
    async with paid(tmp_path) as at:
        budget = Budget(Scope("acme"), "CNY", Period.MONTH, hard_nano=5 * 1_300_000)
        await at.server.running.ledger.set_budget(budget)
        answers = await asyncio.gather(*(at.ask("kimi", "hello", max_tokens=80) for _ in range(6)))
        spent = await at.balanced()
        assert spent <= 5 * 1_300_000
        assert {answer.status for answer in answers} <= {200, 429, 403}
        assert 200 in {answer.status for answer in answers}


async def test_a_client_that_goes_away_pays_for_what_was_evaluated_and_produced(tmp_path: Path) -> None:
    engine = StepEngine(used(Usage(90, 0, 0, 30), *"abcdef"))
    async with paid(tmp_path, engine=engine) as at:
        steps = asyncio.Semaphore(4)
        engine.gate = steps.acquire
        body = {"model": "kimi", "messages": [{"role": "user", "content": "hello"}], "stream": True}
        call = at.server.call("POST", "/v1/chat/completions", body, key=at.key)
        await call.until(b'"a"')
        call.disconnect()
        await call.task
        await at.server.running.turns.drained()
        (row,) = await at.rows("settle")
        assert (row.status, row.n_fresh) == ("client_closed", 90)
        assert 1 <= row.n_output < 30
        assert await at.balanced() == (90 + row.n_output) * 12_000


async def test_a_turn_that_never_began_gives_its_hold_back(tmp_path: Path) -> None:
    async with paid(tmp_path) as at:
        at.server.engine.overloaded = True
        assert (await at.ask("kimi", "hello")).status >= 400
        assert [row.kind for row in await at.rows()] == ["hold", "release"]
        assert await at.balanced() == 0


async def test_a_turn_that_fails_pays_for_what_it_had_used(tmp_path: Path) -> None:
    def script(plan: Plan) -> Sequence[Event]:
        return [Started(90, 0), TextDelta("a"), Failed(ErrorKind.INTERNAL, "broken", Usage(90, 0, 0, 7))]

    async with paid(tmp_path, engine=StepEngine(script)) as at:
        assert (await at.ask("kimi", "hello")).status == 500
        assert await at.balanced() == 97 * 12_000
        assert (await at.rows("settle"))[0].status == "internal"


async def test_choices_share_the_prompt_on_the_bill(tmp_path: Path) -> None:
    async with paid(tmp_path, engine=StepEngine(used(Usage(90, 0, 0, 5), "a"))) as at:
        assert (await at.ask("kimi", "hello", n=3, temperature=1.0)).status == 200
        assert await at.balanced() == (90 + 15) * 12_000


async def test_a_repeat_is_charged_once_and_another_body_is_refused(tmp_path: Path) -> None:
    async with paid(tmp_path, engine=StepEngine(used(Usage(90, 0, 0, 5), "a"))) as at:
        headers = {"idempotency-key": "order-66"}
        assert (await at.ask("kimi", "hello", headers=headers)).status == 200
        first = await at.balanced()
        assert first == 95 * 12_000
        assert (await at.ask("kimi", "hello", headers=headers)).status == 200
        assert await at.balanced() == first
        refused = await at.ask("kimi", "another", headers=headers)
        assert refused.status == 400
        assert "dempotency-Key" in refused.json()["error"]["message"]
        assert (await at.ask("kimi", "another")).status == 200
        assert await at.balanced() == 2 * first


async def test_a_repeat_gets_the_same_answer_so_that_no_other_is_had_for_its_price(tmp_path: Path) -> None:
    async with paid(tmp_path) as at:
        for key in ("order-66", "order-66", "order-67"):
            await at.ask("kimi", "hello", headers={"idempotency-key": key}, temperature=1.0)
        await at.ask("kimi", "hello", headers={"idempotency-key": "order-68"}, temperature=1.0, seed=7)
        await at.ask("kimi", "hello", temperature=1.0)
        first, again, other, own, fresh = (plan.sampling.seed for plan in at.server.engine.plans)
        assert first == again != other
        assert first is not None and other is not None
        assert (own, fresh) == (7, None)


async def test_a_repeat_whose_tag_means_another_object_is_another_request(tmp_path: Path) -> None:
    async with paid(tmp_path) as at:
        made = [await at.server.ready_cache(text * 200, key=at.key, model="kimi", ttl=600) for text in ("x", "y")]

        async def ask(object_id: str) -> Any:
            bound = {"tag": "t", "cache_id": object_id}
            assert (await at.server.request("POST", "/v1/caching/refs/tags", bound, key=at.key)).status == 200
            messages = [{"role": "cache", "content": "tag=t"}, {"role": "user", "content": "?"}]
            body = {"model": "kimi", "messages": messages}
            headers = {"idempotency-key": "order-66"}
            return await at.server.request("POST", "/v1/chat/completions", body, key=at.key, headers=headers)

        assert [(await ask(one["id"])).status for one in (made[0], made[0], made[1])] == [200, 200, 400]


async def test_attempts_that_were_refused_do_not_use_up_a_key(tmp_path: Path) -> None:
    async with paid(tmp_path) as at:
        headers = {"idempotency-key": "order-66"}
        at.server.engine.overloaded = True
        for _ in range(7):
            assert (await at.ask("kimi", "hello", headers=headers)).status == 429
        at.server.engine.overloaded = False
        assert [(await at.ask("kimi", "hello", headers=headers)).status for _ in range(6)] == [200] * 5 + [400]
        await at.balanced()


async def test_turns_that_a_fault_of_the_server_ends_are_charged(tmp_path: Path) -> None:
    engine = StepEngine(used(Usage(90, 0, 0, 30), *"abcdef"))

    async def break_down() -> None:
        async with paid(tmp_path, engine=engine) as at:
            steps = asyncio.Semaphore(4)
            engine.gate = steps.acquire
            body = {"model": "kimi", "messages": [{"role": "user", "content": "hello"}], "stream": True}
            await at.server.call("POST", "/v1/chat/completions", body, key=at.key).until(b'"a"')

            def broken(_now: float, _limit: int) -> Any:
                raise ZeroDivisionError

            at.server.running.warming._objects.expire = broken  # type: ignore[method-assign]  # at the next tick
            await asyncio.Event().wait()

    with pytest.raises(BaseExceptionGroup) as caught:
        await break_down()
    assert caught.group_contains(ZeroDivisionError)
    storage = await asyncio.to_thread(Storage.open, database_path(tmp_path / "data"), 5.0)
    query = sa.select(ledger_rows).order_by(ledger_rows.c.seq)
    hold, settled = await storage.run(lambda connection: connection.execute(query).all())
    await asyncio.to_thread(storage.close)
    assert (hold.kind, settled.kind, settled.n_fresh, settled.status) == ("hold", "settle", 90, "internal")


async def test_what_is_charged_as_finished_is_told_as_finished(tmp_path: Path) -> None:
    """However long the ledger takes."""
    async with paid(tmp_path, turn_s_max=0.5) as at:
        engine, is_slow = at.server.storage._engine, True

        def slow(_connection: Any, _cursor: Any, statement: str, *_more: Any) -> None:
            nonlocal is_slow
            if is_slow and statement.startswith("DELETE FROM holds"):
                is_slow = False
                threading.Event().wait(1.0)

        sa.event.listen(engine, "before_cursor_execute", slow)
        answer = await at.ask("kimi", "hello")
        sa.event.remove(engine, "before_cursor_execute", slow)
        assert not is_slow
        assert answer.status == 200
        assert [row.status for row in await at.rows("settle")] == ["finished"]


async def test_an_object_is_paid_as_one_at_the_prices_it_was_made_at_only(tmp_path: Path) -> None:
    """A name whose objects cost nothing is no way to free reads under another."""
    async with paid(tmp_path) as at:
        made = await at.server.ready_cache("x" * 500, key=at.key, model="minimax", ttl=600)
        messages = [{"role": "cache", "content": f"cache_id={made['id']}"}, {"role": "user", "content": "?"}]
        at.server.engine.script = used(Usage(10, 500, 0, 1), "ok")
        body = {"model": "kimi", "messages": messages, "max_tokens": 5}
        assert (await at.server.request("POST", "/v1/chat/completions", body, key=at.key)).status == 200
        (row,) = await at.rows("settle")
        assert (row.n_read, row.n_object, row.call_nano, row.read_nano) == (500, 0, 0, 500 * 12_000)
        assert await at.faults() == []


async def test_an_object_is_one_under_all_names_whose_objects_cost_the_same(tmp_path: Path) -> None:
    """Kimi's objects are made for the family and used by a model of any length."""
    async with paid(tmp_path) as at:
        made = await at.server.ready_cache("x" * 500, key=at.key, model="kimi", ttl=600)
        messages = [{"role": "cache", "content": f"cache_id={made['id']}"}, {"role": "user", "content": "?"}]
        at.server.engine.script = used(Usage(10, 500, 0, 1), "ok")
        body = {"model": "kimi-32k", "messages": messages, "max_tokens": 5}
        assert (await at.server.request("POST", "/v1/chat/completions", body, key=at.key)).status == 200
        (row,) = await at.rows("settle")
        assert (row.n_object, row.read_nano, row.call_nano) == (500, 0, NANO // 50)
        assert row.fresh_nano == 10 * 24_000


async def test_places_are_an_organisations_whatever_namespaces_its_projects_have(tmp_path: Path) -> None:
    async with paid(tmp_path) as at:
        server = at.server
        identities = Identities(server.storage, server.clock, RandomIds(), tiers={}, default_tier=None)
        await identities.change_organisation("acme", OrganisationChange(cache_scope="project"))
        await identities.create_project("acme", "other")
        new = NewKey("of-other", project="other")
        key, _ = await identities.create_key("acme", new, by=None)
        gate = asyncio.Event()
        server.engine.gate = gate.wait
        async with asyncio.TaskGroup() as tasks:
            asked = [
                tasks.create_task(at.ask("small", "hello")) for _ in range(CONFIG.limits.turns_per_organisation_max)
            ]
            await until(lambda: server.running.turns.n_turns == len(asked))
            refused = await server.chat("hello", key=key, model="small")
            gate.set()
        assert refused.status == 429
        assert "6 of your requests are being served, limit 6" in refused.json()["error"]["message"]
        assert {one.result().status for one in asked} == {200}


async def test_limits_are_told_on_answers_and_refusals(tmp_path: Path) -> None:
    async with paid(tmp_path, limits=LimitOverrides(rpm=2, tpm=100_000)) as at:
        answer = await at.ask("small", "hello", max_tokens=50)
        assert answer.headers["x-ratelimit-limit-requests"] == "2"
        assert answer.headers["x-ratelimit-remaining-requests"] == "1"
        assert int(answer.headers["x-ratelimit-remaining-tokens"]) < 100_000
        await at.ask("small", "hello", max_tokens=50)
        body = {"model": "small", "max_tokens": 5, "messages": [{"role": "user", "content": "hello"}]}
        refused = await at.server.request("POST", "/anthropic/v1/messages", body, key=at.key)
        assert refused.status == 429
        assert refused.json()["error"]["type"] == "rate_limit_error"
        assert refused.headers["anthropic-ratelimit-requests-remaining"] == "0"
        assert refused.headers["anthropic-organization-id"] == "acme"
        assert int(refused.headers["retry-after"]) >= 1
        refused = await at.ask("small", "hello")
        assert refused.json()["error"]["type"] == "rate_limit_reached_error"
        assert len(at.server.engine.plans) == 2


async def test_tokens_that_were_not_used_are_given_back_to_the_minute(tmp_path: Path) -> None:
    async with paid(tmp_path, limits=LimitOverrides(tpm=1_200), engine=StepEngine(used(Usage(90, 0, 0, 5), "a"))) as at:
        for _ in range(4):  # each asks for 800 and more
            answer = await at.ask("small", "hello", max_tokens=800)
            assert answer.status == 200
        assert (await at.ask("small", "hello", max_tokens=800)).status == 429


async def test_an_object_that_cannot_be_made_costs_nothing(tmp_path: Path) -> None:
    def script(plan: Plan) -> Sequence[Event]:
        return [Failed(ErrorKind.OVERLOADED, "no room")]

    async with paid(tmp_path, engine=StepEngine(script)) as at:
        created = await at.server.create_cache("x" * 500, key=at.key, model="kimi")
        assert (await at.server.settled(created["id"], key=at.key))["status"] == "error"
        while await at.holds():  # noqa: ASYNC110 - given back right after the status can be seen
            await asyncio.sleep(0)
        assert await at.balanced() == 0
        assert await at.rows("creation", "storage") == []


async def test_an_object_made_ready_again_is_not_paid_again_and_its_meter_goes_on_over_a_restart(
    tmp_path: Path,
) -> None:
    async with paid(tmp_path) as at:
        made = await at.server.ready_cache("x" * 500, key=at.key, model="kimi", ttl=600)
        await at.server.request("PUT", f"/v1/caching/{made['id']}", {"metadata": {"a": "b"}}, key=at.key)
        await at.server.settled(made["id"], key=at.key)
        began = at.server.clock.now_s
    async with paid(tmp_path) as at:
        at.server.clock.now_s = began + 30.0
        await until(lambda: bool(at.server.engine.pins))
        await at.server.running.paying.tick()
        at.server.clock.advance(600.0)
        await at.server.running.paying.tick()
        assert len(await at.rows("creation")) == 1
        assert sum(row.storage_nano for row in await at.rows("storage")) == made["tokens"] * 10_000 * 10
        assert sum(row.n_units for row in await at.rows("storage")) == 600


async def test_a_deleted_object_is_paid_until_it_was_deleted(tmp_path: Path) -> None:
    async with paid(tmp_path) as at:
        made = await at.server.ready_cache("x" * 500, key=at.key, model="kimi", ttl=600)
        at.server.clock.advance(61.0)
        await at.server.request("DELETE", f"/v1/caching/{made['id']}", key=at.key)
        at.server.clock.advance(600.0)
        await at.server.running.paying.tick()
        assert sum(row.storage_nano for row in await at.rows("storage")) == made["tokens"] * 10_000 * 2


async def test_an_object_deleted_behind_the_servers_back_is_paid_until_the_next_tick(tmp_path: Path) -> None:
    async with paid(tmp_path) as at:
        made = await at.server.ready_cache("x" * 500, key=at.key, model="kimi", ttl=6000)
        await at.server.storage.run(lambda connection: connection.execute(sa.delete(cache_objects)))
        at.server.clock.advance(61.0)
        await at.server.running.paying.tick()
        at.server.clock.advance(600.0)
        await at.server.running.paying.tick()
        assert sum(row.storage_nano for row in await at.rows("storage")) == made["tokens"] * 10_000 * 2


async def test_a_turn_that_takes_too_long_is_a_timeout_in_the_ledger(tmp_path: Path) -> None:
    engine = StepEngine(used(Usage(90, 0, 0, 30), *"abcdef"))
    async with paid(tmp_path, engine=engine, turn_s_max=0.2) as at:
        steps = asyncio.Semaphore(4)
        engine.gate = steps.acquire
        assert (await at.ask("kimi", "hello")).status == 504
        (row,) = await at.rows("settle")
        assert (row.status, row.n_fresh) == ("timeout", 90)


async def test_a_key_may_use_its_models_only(tmp_path: Path) -> None:
    async with paid(tmp_path) as at:
        identities = Identities(at.server.storage, at.server.clock, RandomIds(), tiers={}, default_tier=None)
        key, _ = await identities.create_key("acme", NewKey("few", models=("kimi",)), by=None)
        assert (await at.server.chat("hello", key=key, model="kimi")).status == 200
        refused = await at.server.chat("hello", key=key, model="small")
        assert refused.status == 403
        assert "may use: kimi" in refused.json()["error"]["message"]
        listed = (await at.server.request("GET", "/v1/models", key=key)).json()
        assert [model["id"] for model in listed["data"]] == ["kimi"]
        assert (await at.server.request("GET", "/v1/models/small", key=key)).status == 403
        refused = await at.server.request(
            "POST", "/v1/caching", {"model": "small", "messages": [{"role": "system", "content": "x"}]}, key=key
        )
        assert refused.status == 403


async def test_an_object_extended_before_its_end_is_one_life_though_it_is_ready_after_it(tmp_path: Path) -> None:
    async with paid(tmp_path) as at:
        made = await at.server.ready_cache("x" * 500, key=at.key, model="kimi", ttl=60)
        at.server.clock.advance(55.0)
        gate = asyncio.Semaphore(0)
        at.server.engine.gate = gate.acquire
        await at.server.request("PUT", f"/v1/caching/{made['id']}", {"ttl": 3600}, key=at.key)
        at.server.clock.advance(10.0)
        await at.server.running.paying.tick()
        at.server.engine.gate = None
        for _ in range(20):
            gate.release()
        await at.server.settled(made["id"], key=at.key)
        assert len(await at.rows("creation")) == 1


async def test_a_cancelled_turn_has_an_end_where_turns_are_looked_up(tmp_path: Path) -> None:
    engine = StepEngine(used(Usage(90, 0, 0, 30), *"abcdef"))
    async with paid(tmp_path, engine=engine) as at:
        steps = asyncio.Semaphore(4)
        engine.gate = steps.acquire
        body = {"model": "kimi", "messages": [{"role": "user", "content": "hello"}], "stream": True}
        call = at.server.call("POST", "/v1/chat/completions", body, key=at.key)
        await call.until(b'"a"')
        call.disconnect()
        await call.task
        await at.server.running.turns.drained()
        (row,) = await at.rows("settle")
        record = await at.server.request("GET", f"/admin/turns/{row.turn_id}", key=at.key)
        assert record.json()["status"] == "client_closed"
