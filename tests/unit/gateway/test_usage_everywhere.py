"""The same counts in the engine's words, the vendor's and the ledger's, over random traffic of all dialects."""

import random
from pathlib import Path
from typing import Any

import pytest

from keepwarm.core.event import Usage
from tests.paid import Paid, paid, used

Counts = tuple[int, int, int, int]  # prompt, read, written, output


def kimi(told: Any) -> Counts:
    cached = told.get("prompt_tokens_details", {}).get("cached_tokens", told.get("cached_tokens", 0))
    assert told["total_tokens"] == told["prompt_tokens"] + told["completion_tokens"]
    return told["prompt_tokens"], cached or 0, -1, told["completion_tokens"]


def anthropic(told: Any) -> Counts:
    read, written = told["cache_read_input_tokens"], told["cache_creation_input_tokens"]
    split = told["cache_creation"]
    assert split["ephemeral_5m_input_tokens"] + split["ephemeral_1h_input_tokens"] == written
    return told["input_tokens"] + read + written, read, written, told["output_tokens"]


def gemini(told: Any) -> Counts:
    assert told["totalTokenCount"] == told["promptTokenCount"] + told["candidatesTokenCount"]
    return told["promptTokenCount"], told.get("cachedContentTokenCount", 0), -1, told["candidatesTokenCount"]


async def ask(at: Paid, dialect: str) -> Counts:
    said = [{"role": "user", "content": "hello"}]
    if dialect == "anthropic":
        body: Any = {"model": "kimi", "max_tokens": 9, "messages": said}
        return anthropic((await at.server.request("POST", "/anthropic/v1/messages", body, key=at.key)).json()["usage"])
    if dialect == "gemini":
        body = {"contents": [{"role": "user", "parts": [{"text": "hello"}]}]}
        path = "/v1beta/models/kimi:generateContent"
        return gemini((await at.server.request("POST", path, body, key=at.key)).json()["usageMetadata"])
    path = {"kimi": "/v1", "openai": "/openai/v1", "minimax": "/minimax/v1"}[dialect] + "/chat/completions"
    body = {"model": "kimi", "max_tokens": 9, "messages": said}
    return kimi((await at.server.request("POST", path, body, key=at.key)).json()["usage"])


@pytest.mark.parametrize("seed", range(4))
async def test_fresh_and_read_and_written_are_the_prompt_everywhere(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    async with paid(tmp_path) as at:
        for _ in range(25):
            dialect = chance.choice(["kimi", "openai", "minimax", "anthropic", "gemini"])
            read, written = (chance.choice([0, chance.randrange(1, 5_000)]) for _ in range(2))
            long = chance.randrange(written + 1)
            usage = Usage(chance.randrange(2, 3_000), read, written, chance.randrange(1, 900), long)
            at.server.engine.script = used(usage, "ok")
            prompt, told_read, told_written, output = await ask(at, dialect)
            row = (await at.rows("settle"))[-1]
            assert row.n_fresh + row.n_read + row.n_write == usage.prompt == prompt
            assert row.n_read == usage.cache_read == told_read
            assert row.n_write == usage.cache_write
            assert told_written in (-1, usage.cache_write)  # told by Anthropic's alone
            assert row.n_write_long == usage.cache_write_long
            assert row.n_output == usage.output == output
            assert row.dialect == dialect
            record = await at.server.request("GET", f"/admin/turns/{row.turn_id}", key=at.key)
            assert record.json()["usage"]["fresh"] == usage.fresh
        taken = sum(
            row.fresh_nano + row.read_nano + row.write_nano + row.output_nano + row.call_nano
            for row in await at.rows("settle")
        )
        assert await at.balanced() == taken > 0
