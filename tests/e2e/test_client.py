"""The assistant kit against the real server process with the scripted model: what an application sees of the cache."""

import asyncio
import os
import sqlite3
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import openai
import pytest

from keepwarm.client import AsyncCacheBook, CacheBook, Form, Knowledge, Policy

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]
MODEL = "moonshot-v1-8k"
QUICK = Policy(check_s=0.0, retry_s=0.2)
TOOL = {
    "type": "function",
    "function": {"name": "look", "description": "Looks it up.", "parameters": {"type": "object", "properties": {}}},
}
WORKER = """
import sys, openai
from keepwarm.client import CacheBook, Knowledge
url, key, path, text = sys.argv[1:]
with openai.OpenAI(api_key=key, base_url=url, max_retries=0) as client:
    print("started", flush=True)
    sys.stdin.readline()
    book = CacheBook(client, path)
    knowledge = Knowledge([{"role": "system", "content": text}])
    for i in range(3):
        book.ask("manual", knowledge, [{"role": "user", "content": str(i)}], model="moonshot-v1-8k", max_tokens=2)
"""


def text(seed):
    return f"The manual, edition {seed}. " + f"Rule {seed}: keep it warm. " * 60


def knowledge(seed=1, tools=()):
    return Knowledge([{"role": "system", "content": text(seed)}], tools)


def user(content="How?"):
    return [{"role": "user", "content": content}]


def objects(client):
    return client.get("/caching", cast_to=object)["data"]


def ask(book, known, new=None, **more):
    return book.ask("manual", known, new or user(), model=MODEL, temperature=0, max_tokens=12, **more)


def said(answer):
    return answer.choices[0].message.content


def ready(book, known, **more):
    """Prepared until the object is used."""
    for _ in range(300):
        sending = book.prepare("manual", known, user(), **more)
        if sending.cache_id is not None:
            return sending
        time.sleep(0.05)
    raise AssertionError("the object was never ready")


@pytest.fixture
def key(request):
    return f"sk-{request.node.name}"


@pytest.fixture
def client(running, key):
    return running.client(key)


@pytest.fixture
def book(client, tmp_path):
    return CacheBook(client, tmp_path / "book.sqlite3", policy=QUICK)


def test_all_forms_give_one_answer(client, book):
    known = knowledge(tools=[TOOL])
    first = ask(book, known)
    assert len(objects(client)) == 1
    sending = ready(book, known)
    assert sending.messages[0]["content"] == f"cache_id={sending.cache_id};reset_ttl=3600"
    assert "tools" not in sending.arguments
    by_message = ask(book, known)
    by_header = ask(book, known, form=Form.HEADERS)
    assert said(first) == said(by_message) == said(by_header)
    tokens = objects(client)[0]["tokens"]
    assert by_message.usage.cached_tokens >= tokens
    assert by_header.usage.cached_tokens >= tokens
    assert first.usage.prompt_tokens == by_message.usage.prompt_tokens == by_header.usage.prompt_tokens


@pytest.mark.parametrize("form", Form, ids=lambda form: form.value)
def test_streams(book, form):
    known = knowledge()
    whole = said(ask(book, known))
    ready(book, known)
    with ask(book, known, form=form, stream=True) as stream:
        assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == whole


def test_a_conversation_goes_on_behind_the_object(book):
    known = knowledge()
    new = user()
    ready(book, known)
    for question in ("And then?", "Why?"):
        answer = ask(book, known, new)
        new = [*new, {"role": "assistant", "content": said(answer)}, *user(question)]
    assert ask(book, known, new).usage.cached_tokens > 0


def test_headers_of_the_application_are_kept(book):
    known = knowledge()
    ready(book, known)
    sending = book.prepare("manual", known, user(), form=Form.HEADERS)
    assert sending.extra_headers["X-Msh-Context-Cache"] == sending.cache_id
    answer = ask(book, known, form=Form.HEADERS, extra_headers={"X-Msh-Context-Cache-DryRun": "1"})
    assert not said(answer)


def test_threads_that_start_at_once_make_one_object(client, tmp_path):
    known = knowledge()

    def work(number):
        own = CacheBook(client, tmp_path / "book.sqlite3", policy=QUICK)
        return said(ask(own, known, user("The same?")))

    with ThreadPoolExecutor(24) as pool:
        answers = list(pool.map(work, range(48)))
    assert len(set(answers)) == 1
    assert len(objects(client)) == 1


def test_processes_that_start_at_once_make_one_object(running, key, client, tmp_path):
    command = [sys.executable, "-c", WORKER, running.url + "/v1", key, str(tmp_path / "book.sqlite3"), text(1)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    workers = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment) for _ in range(6)
    ]
    for worker in workers:
        assert worker.stdout.readline() == b"started\n"
    for worker in workers:
        worker.stdin.write(b"go\n")
        worker.stdin.flush()
    for worker in workers:
        worker.communicate(timeout=120)
        assert worker.returncode == 0
    assert len(objects(client)) == 1


def test_the_asynchronous_book(running, key, tmp_path):
    async def asked():
        async with openai.AsyncOpenAI(api_key=key, base_url=running.url + "/v1", max_retries=0) as made:
            book = await asyncio.to_thread(AsyncCacheBook, made, tmp_path / "book.sqlite3", policy=QUICK)
            known = knowledge()
            answers = await asyncio.gather(*(ask(book, known) for _ in range(16)))
            for _ in range(300):
                sending = await book.prepare("manual", known)
                if sending.cache_id is not None:
                    break
                await asyncio.sleep(0.05)
            hit = await ask(book, known)
            async with await ask(book, known, stream=True) as stream:
                streamed = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
            await made.delete(f"/caching/{sending.cache_id}", cast_to=object)
            vanished = await ask(book, known)
            return {*map(said, answers), said(hit), streamed, said(vanished)}, hit.usage.cached_tokens

    answers, n_cached = asyncio.run(asked())
    assert len(answers) == 1
    assert n_cached > 0


def test_an_object_deleted_behind_its_back_is_made_anew(client, book):
    known = knowledge()
    sending = ready(book, known)
    before = said(ask(book, known))
    client.delete(f"/caching/{sending.cache_id}", cast_to=object)
    assert said(ask(book, known)) == before  # the server said 404, the application has not seen it
    again = ready(book, known)
    assert again.cache_id != sending.cache_id
    assert said(ask(book, known)) == before
    assert len(objects(client)) == 1


def test_an_application_that_calls_by_itself_is_told_what_to_send_again(client, book):
    known = knowledge()
    sending = ready(book, known)
    client.delete(f"/caching/{sending.cache_id}", cast_to=object)
    with pytest.raises(openai.NotFoundError) as refused:
        client.chat.completions.create(model=MODEL, **sending.arguments)
    again = book.again(sending, refused.value)
    assert again.messages[0] == known.messages[0]
    assert client.chat.completions.create(model=MODEL, max_tokens=2, **again.arguments).choices


def test_in_the_header_form_a_vanished_object_is_noticed_by_the_answer(client, book):
    known = knowledge()
    sending = ready(book, known)
    client.delete(f"/caching/{sending.cache_id}", cast_to=object)
    assert ask(book, known, form=Form.HEADERS).choices
    assert ready(book, known, form=Form.HEADERS).cache_id != sending.cache_id
    assert len(objects(client)) == 1


def test_a_short_lifetime_is_prolonged_by_use_and_an_expired_object_comes_back(client, tmp_path):
    book = CacheBook(client, tmp_path / "book.sqlite3", policy=Policy(ttl_s=2, check_s=0.0))
    known = knowledge()
    sending = ready(book, known)
    before = said(ask(book, known))
    first_end = client.get(f"/caching/{sending.cache_id}", cast_to=object)["expired_at"]
    while client.get(f"/caching/{sending.cache_id}", cast_to=object)["expired_at"] < first_end + 2:
        assert said(ask(book, known)) == before
        time.sleep(0.2)
    while client.get(f"/caching/{sending.cache_id}", cast_to=object)["status"] != "inactive":
        time.sleep(0.2)
    assert said(ask(book, known)) == before
    assert ready(book, known).cache_id == sending.cache_id
    assert said(ask(book, known)) == before
    assert len(objects(client)) == 1


def test_changed_knowledge_makes_a_new_object_and_deletes_the_old_one(client, book):
    sending = ready(book, knowledge(1))
    old = said(ask(book, knowledge(1)))
    changed = ready(book, knowledge(2))
    assert changed.cache_id != sending.cache_id
    assert [found["id"] for found in objects(client)] == [changed.cache_id]
    assert book.prepare("manual", knowledge(1)).cache_id is None  # the version before is still running somewhere
    assert said(ask(book, knowledge(1))) == old
    assert [found["id"] for found in objects(client)] == [changed.cache_id]


def moved(path, to):
    """A book's rows are a server's, by its base URL; here the next process has another port."""
    with closing(sqlite3.connect(path)) as rows, rows:
        rows.execute("UPDATE objects SET server = ?", (f"{to.url}/v1/",))
    return CacheBook(to.client(), path, policy=QUICK)


def test_a_book_outlives_the_server_and_a_server_that_forgot_everything(start, tmp_path):
    one = start()
    path, known = tmp_path / "book.sqlite3", knowledge()
    book = CacheBook(one.client(), path, policy=QUICK)
    sending = ready(book, known)
    before = said(ask(book, known))
    one.process.terminate()
    one.process.wait(30)
    with pytest.raises(openai.APIConnectionError):
        ask(book, known)

    again = start()
    book = moved(path, again)
    assert book.prepare("manual", known).cache_id == sending.cache_id
    answer = ask(book, known)
    assert said(answer) == before
    assert answer.usage.cached_tokens > 0

    empty = start(data_dir=tmp_path / "other")
    book = moved(path, empty)
    assert said(ask(book, known)) == before
    assert ready(book, known).cache_id != sending.cache_id


def test_an_object_nobody_wrote_down_is_found_again(client, tmp_path):
    book = CacheBook(client, tmp_path / "book.sqlite3", policy=QUICK)
    known = knowledge()
    sending = ready(book, known)
    with closing(sqlite3.connect(tmp_path / "book.sqlite3")) as rows, rows:  # killed between a creation and its record
        rows.execute("UPDATE objects SET cache_id = NULL, ready = 0, uncertain = 1, claim = 'x', claimed_until = 1")
    assert ready(book, known).cache_id == sending.cache_id
    assert len(objects(client)) == 1


def test_errors_of_the_request_itself_pass_through(start, tmp_path):
    data_dir = tmp_path / "data"
    server = start(dev=False, data_dir=data_dir)  # with --dev every model name is known
    command = [sys.executable, "-m", "keepwarm", "keys", "create", "ci", "--data-dir", str(data_dir)]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    client = server.client(next(word for word in shown.split() if word.startswith("sk-kw-")))
    book = CacheBook(client, tmp_path / "book.sqlite3", policy=QUICK)
    known = knowledge()
    for _ in range(2):  # first in full, then by the object
        with pytest.raises(openai.NotFoundError, match="unheard-of"):
            book.ask("manual", known, user(), model="unheard-of")
        ready(book, known)
    with pytest.raises(openai.BadRequestError, match="top_p"):
        ask(book, known, top_p=7)
    assert len(objects(client)) == 1
    other = CacheBook(client, tmp_path / "book.sqlite3", model="unheard-of", policy=QUICK)
    assert other.ask("other", known, user(), model=MODEL, max_tokens=2).choices  # no object can be made; no error
    with pytest.raises(openai.AuthenticationError):
        ask(CacheBook(server.client("sk-wrong"), tmp_path / "other.sqlite3"), known)


def test_an_unusable_file_costs_the_cache_only(client, book, tmp_path):
    known = knowledge()
    ready(book, known)
    with closing(sqlite3.connect(tmp_path / "book.sqlite3")) as rows:
        rows.execute("DROP TABLE objects")
    assert ask(book, known).choices
    assert book.prepare("manual", known).cache_id is None
