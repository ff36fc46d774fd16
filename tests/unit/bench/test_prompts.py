import pytest

from keepwarm.bench.prompts import Ask, Prompts, n_shared
from keepwarm.config import Config
from keepwarm.engine import ModelInfo
from keepwarm.engine.scripted import ScriptedVocab


def prompts(granularity: int | None) -> Prompts:
    model = ModelInfo("d", 8192, 8, 259, "scripted", "plain", "strict", granularity, "f16", 64)
    return Prompts(ScriptedVocab(), Config(), model)


@pytest.mark.parametrize("granularity, start", [(None, 0), (1, 0), (8, 0), (8, 64), (64, 512)])
def test_the_ubatches_cover_the_rest_of_the_prompt(granularity: int | None, start: int) -> None:
    made = prompts(granularity)
    prompt = made.prompt(Ask("context " * 100, "question"))
    rows = made.rows(prompt, start)
    assert sum(rows) == prompt.n_tokens - start
    assert all(n <= made.n_ubatch and n % (granularity or 1) == 0 for n in rows[:-1])


def test_the_end_of_an_object_is_the_end_of_an_ubatch() -> None:
    made = prompts(8)
    prompt = made.prompt(Ask("context " * 20, "question", "cache-1", 101))
    rows = made.rows(prompt, 0)
    assert 101 in [sum(rows[: i + 1]) for i in range(len(rows))]


def test_what_prompts_have_in_common() -> None:
    made = prompts(1)
    asked = [made.prompt(Ask("the same context", question)) for question in ("1 one", "2 two", "3 three")]
    n = n_shared(asked)
    assert bytes(asked[0].tokens[n : n + 5].tolist()) == b"1 one"
    assert n_shared(asked[:1]) == asked[0].n_tokens


def test_a_question_behind_an_object_names_it() -> None:
    assert Ask("text", "why", "cache-1", 5).messages()[0] == {"role": "cache", "content": "cache_id=cache-1"}
    assert Ask("text", "why").messages()[0] == {"role": "system", "content": "text"}
