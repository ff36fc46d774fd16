"""Warm-up prompts: read like a client's, computed at start and in every new engine, never in a turn's way for long."""

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
from msgspec.structs import replace

from keepwarm.app import ServeError, serve
from keepwarm.config import Config, ConfigError, ModelConfig, WarmPrompt, load
from keepwarm.core.errors import ErrorKind
from keepwarm.core.event import ChoiceFinished, Event, Failed, Finished, Started, Usage
from keepwarm.core.prompt import Plan, Priority
from keepwarm.gateway.warmup import read_prompts
from tests.engines import StepEngine, says
from tests.world import CONFIG, DURABLE, World, until, world

pytestmark = pytest.mark.anyio

TOOLS = '[{"type": "function", "function": {"name": "look_up", "description": "finds", "parameters": {"a": 1.0}}}]'


def config_of(*prompts: WarmPrompt, config: Config = CONFIG) -> Config:
    return replace(config, warm=prompts)


def lines(server: World, event: str) -> list[Any]:
    return [line for line in server.logged if line["event"] == event]


async def test_a_prompt_is_computed_at_start_as_its_tenants_requests_begin(tmp_path: Path) -> None:
    for name, text in (("system.txt", "You know this:\n"), ("a.md", "# A\n"), ("b.md", "ünd B"), ("tools.json", TOOLS)):
        (tmp_path / name).write_text(text, encoding="utf-8")
    prompt = WarmPrompt(
        tenant="k1",
        name="manual",
        system_file=str(tmp_path / "system.txt"),
        files=(str(tmp_path / "a.md"), str(tmp_path / "b.md")),
        tools_file=str(tmp_path / "tools.json"),
    )
    async with world(tmp_path, config=config_of(prompt)) as server:
        await until(lambda: bool(lines(server, "prompt warmed up")))
        (plan,) = server.engine.plans
        assert (plan.output.max_tokens, plan.pin_id, plan.priority, plan.store) == (0, None, Priority.IDLE, True)
        (line,) = lines(server, "prompt warmed up")
        assert (line["prompt"], line["n_tokens"], line["source"]) == ("manual", plan.prompt.n_tokens, "computed")
        assert "ünd" not in str(server.logged)
        messages = [
            {"role": "system", "content": "You know this:\n# A\nünd B"},
            {"role": "user", "content": "Well?"},
        ]
        body = {"model": "small", "messages": messages}
        await server.request("POST", "/v1/chat/completions", {**body, "tools": msgspec.json.decode(TOOLS)})
        turn = server.engine.plans[1]
        assert turn.prompt.tenant == plan.prompt.tenant != "k1", "as --dev maps the key"
        n_tokens = plan.prompt.n_tokens
        assert turn.prompt.tokens[:n_tokens].tolist() == plan.prompt.tokens.tolist()
        server.assert_clean()


async def test_without_dev_the_tenant_is_taken_as_it_is(tmp_path: Path) -> None:
    config = replace(config_of(WarmPrompt("research", system="text")), dev=False)
    async with world(tmp_path, config=config) as server:
        await until(lambda: bool(server.engine.plans))
        assert server.engine.plans[0].prompt.tenant == "research"


async def test_prompts_follow_each_other_and_come_again_in_every_new_engine(tmp_path: Path) -> None:
    config = config_of(WarmPrompt("k1", system="one"), WarmPrompt("k1", system="two"))
    engine = StepEngine()
    most = 0

    def script(plan: Plan) -> Sequence[Event]:
        nonlocal most
        most = max(most, len(engine.running))
        return says("ok", cache_read=5)(plan)

    engine.script = script
    async with world(tmp_path, config=config, engine=engine) as server:
        await until(lambda: len(lines(server, "prompt warmed up")) == 2)
        server.engine.lose()
        await until(lambda: len(lines(server, "prompt warmed up")) == 4)
        assert most == 1
        assert [line["prompt"] for line in lines(server, "prompt warmed up")] == ["0", "1"] * 2
        first, second, *again = [plan.prompt.tokens.tolist() for plan in server.engine.plans]
        assert [first, second] == again
        assert first != second


async def test_what_a_turn_made_the_engine_give_up_is_asked_for_until_it_is_whole(tmp_path: Path) -> None:
    n_done = [0, 10, 20]  # tokens stored by the earlier attempts

    def script(plan: Plan) -> Sequence[Event]:
        read = n_done.pop(0)
        n_evaluated = n_done[0] if n_done else plan.prompt.n_tokens
        usage = Usage(n_evaluated - read, read, 0, 0)
        return [Started(plan.prompt.n_tokens, read), ChoiceFinished("length", 0), Finished(usage)]

    config = config_of(WarmPrompt("k1", system="a text of some length, longer than twenty"))
    async with world(tmp_path, config=config, engine=StepEngine(script)) as server:
        await until(lambda: bool(lines(server, "prompt warmed up")))
        (line,) = lines(server, "prompt warmed up")
        assert len(server.engine.plans) == 3
        assert line["n_tokens_computed"] == line["n_tokens"] == server.engine.plans[0].prompt.n_tokens


async def test_a_prompt_that_fails_is_one_line_and_the_next_is_computed(tmp_path: Path) -> None:
    def script(plan: Plan) -> Sequence[Event]:
        match bytes(plan.prompt.tokens.astype("u1")).find(b"bad"), bytes(plan.prompt.tokens.astype("u1")).find(b"bug"):
            case -1, -1:
                return says("ok")(plan)
            case _, -1:
                return [Failed(ErrorKind.PROMPT_TOO_LONG, "prompt has 9,120 tokens")]
        raise ZeroDivisionError

    prompts = [WarmPrompt("k1", system=text) for text in ("bad", "bug", "fine")]
    async with world(tmp_path, config=config_of(*prompts), engine=StepEngine(script)) as server:
        await until(lambda: bool(lines(server, "prompt warmed up")))
        (failed,) = lines(server, "prompt not warmed up")
        assert (failed["prompt"], failed["reason"]) == ("0", "prompt has 9,120 tokens")
        (broken,) = lines(server, "warming up failed")
        assert broken["error"] == "ZeroDivisionError"
        assert lines(server, "prompt warmed up")[0]["prompt"] == "2"


async def test_a_lost_engine_gives_a_prompt_up_until_the_next_is_ready(tmp_path: Path) -> None:
    engine = StepEngine(lambda plan: [Failed(ErrorKind.ENGINE_DOWN, "the engine restarted during this request")])
    async with world(tmp_path, config=config_of(WarmPrompt("k1", system="one")), engine=engine) as server:
        await until(lambda: bool(lines(server, "prompt not warmed up")))
        assert len(engine.plans) == 1
        engine.script = says("ok")
        engine.lose()
        await until(lambda: bool(lines(server, "prompt warmed up")))


async def test_a_leased_prompt_is_kept_by_every_process_until_its_text_changes(tmp_path: Path) -> None:
    config = config_of(WarmPrompt("k1", system="one", lease=True), config=DURABLE)
    async with world(tmp_path, config=config) as server:
        await until(lambda: bool(lines(server, "prompt warmed up")))
        (pin_id,) = server.engine.pins
        await server.running.warming.tick()
        server.engine.go_down()
        server.engine.come_up([pin_id])
        await until(lambda: len(lines(server, "prompt warmed up")) == 2)
        assert server.engine.pins == {pin_id}
        server.engine.damage(pin_id)
        await until(lambda: len(lines(server, "prompt warmed up")) == 3)
        assert server.engine.pins == {pin_id}
        assert server.engine.dropped == []
    engine = StepEngine()
    engine.come_up([pin_id])
    changed = config_of(WarmPrompt("k1", system="two", lease=True), config=DURABLE)
    async with world(tmp_path, config=changed, engine=engine) as server:
        await until(lambda: bool(lines(server, "prompt warmed up")))
        assert pin_id not in engine.pins
        assert len(engine.pins) == 1


async def test_stopping_in_the_middle_leaves_nothing(tmp_path: Path) -> None:
    engine = StepEngine()
    engine.gate = asyncio.Semaphore(1).acquire
    prompt = WarmPrompt("k1", system="one", lease=True)
    async with world(tmp_path, config=config_of(prompt, config=DURABLE), engine=engine):
        await until(lambda: bool(engine.running))
    assert engine.is_clean
    assert engine.pins == set()


def no_tools(raw: bytes) -> tuple[()]:
    raise AssertionError(raw)


def test_files_that_cannot_be_read_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    for path, words in ((tmp_path / "none", "cannot read"), (tmp_path, "cannot read"), (tmp_path / "binary", "UTF-8")):
        for prompt in (
            WarmPrompt("t", name="n", system_file=str(path)),
            WarmPrompt("t", name="n", system="x", files=(str(path),)),
        ):
            with pytest.raises(ConfigError, match=words) as raised:
                read_prompts([prompt], {}, no_tools)
            assert str(path) in str(raised.value)
            assert "warm-up prompt 'n'" in str(raised.value)
            assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "text",
    [
        "nothing",
        '{"type": "function"}',
        '[{"type": "function", "function": {}}]',
        '[{"type": "x", "function": {"name": "f"}}]',
    ],
)
def test_tools_that_make_no_sense_and_files_that_are_not_there_end_the_start(tmp_path: Path, text: str) -> None:
    tools = tmp_path / "tools.json"
    tools.write_text(text, encoding="utf-8")
    config = Config(port=0, data_dir=str(tmp_path), model=ModelConfig(engine="scripted"), dev=True)
    with pytest.raises(ServeError, match=r"tools\.json: ") as raised:
        serve(replace(config, warm=(WarmPrompt("t", system="x", tools_file=str(tools)),)))
    assert "\n" not in str(raised.value)
    with pytest.raises(ServeError, match="cannot read"):
        serve(replace(config, warm=(WarmPrompt("t", system_file=str(tmp_path / "none")),)))


def test_the_configuration_file_has_a_section_for_each_prompt(tmp_path: Path) -> None:
    file = tmp_path / "keepwarm.toml"
    file.write_text('[[warm]]\ntenant = "a"\nsystem = "x"\n[[warm]]\ntenant = "b"\nfiles = ["f"]\nlease = true\n')
    assert load(str(file), {}).warm == (WarmPrompt("a", system="x"), WarmPrompt("b", files=("f",), lease=True))


@pytest.mark.parametrize(
    "text, words",
    [
        ('system = "x"', "tenant"),
        ('tenant = " "\nsystem = "x"', r"\$\.warm\[1\]\.tenant is empty"),
        ('tenant = "a"', r"\$\.warm\[1\] has no text; give"),
        ('tenant = "a"\ntools_file = "f"', "has no text; give"),
        ('tenant = "a"\nsystem = "x"\nsystem_file = "f"', "has both system and system_file"),
        ('tenant = "a"\nsystem = "x"\nsystem_fil = "f"', "system_fil"),
    ],
)
def test_a_prompt_that_cannot_be_meant_is_refused_with_its_place(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "keepwarm.toml"
    file.write_text(f'[[warm]]\ntenant = "fine"\nsystem = "x"\n[[warm]]\n{text}\n')
    with pytest.raises(ConfigError, match=words):
        load(str(file), {})
