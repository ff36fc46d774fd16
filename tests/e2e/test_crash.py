"""kill -9 of either process: nothing acknowledged is lost, turns get a retryable error, objects come back by themselves."""

import concurrent.futures
import os
import signal
import threading
import time

import openai
import psutil
import pytest

pytestmark = pytest.mark.e2e
TEXT = "The harbour master counts the ships that come in with the tide. " * 20


def create(client, text=TEXT, **more):
    messages = [{"role": "system", "content": text}]
    return client.post(
        "/caching", body={"model": "moonshot-v1", "messages": messages, "ttl": 600} | more, cast_to=object
    )


def status(client, cache_id):
    return client.get(f"/caching/{cache_id}", cast_to=object)["status"]


def wait_status(client, cache_id, wanted="ready"):
    for _ in range(300):
        if status(client, cache_id) == wanted:
            return
        time.sleep(0.05)
    raise AssertionError(f"still {status(client, cache_id)}")


def engine_process(server):
    (child,) = [p for p in psutil.Process(server.process.pid).children() if "keepwarm.engine.worker" in p.cmdline()]
    return child


def by_role(client, cache_id):
    messages = [{"role": "cache", "content": f"cache_id={cache_id}"}, {"role": "user", "content": "How many?"}]
    return client.chat.completions.create(model="moonshot-v1", messages=messages, temperature=0, max_tokens=16)


def test_no_acknowledged_object_is_lost_when_the_gateway_is_killed(start, tmp_path):
    server = start(data_dir=tmp_path / "kept")
    acknowledged = []

    def make():
        client = server.client("one")
        for i in range(1000):
            try:
                acknowledged.append(create(client, f"{i} {TEXT}", metadata={"n": str(i)})["id"])
            except openai.APIError:
                return

    worker = threading.Thread(target=make)
    worker.start()
    while len(acknowledged) < 10:
        time.sleep(0.01)
    engine = engine_process(server)
    server.kill()
    worker.join()
    engine.wait(10)  # the engine's process does not outlive its gateway

    again = start(data_dir=tmp_path / "kept")
    client = again.client("one")
    for cache_id in acknowledged:
        wait_status(client, cache_id)
    answer = by_role(client, acknowledged[3])
    assert answer.usage.cached_tokens == client.get(f"/caching/{acknowledged[3]}", cast_to=object)["tokens"]


def test_a_killed_engine_comes_back_with_its_objects_and_the_same_answers(start):
    server = start()
    client = server.client("one")
    cache_id = create(client)["id"]
    wait_status(client, cache_id)
    before = by_role(client, cache_id)
    epoch = server.health()["engine"]["epoch"]

    engine = engine_process(server)
    os.kill(engine.pid, signal.SIGSTOP)  # so that the turn is certainly under way when the process dies
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        turn = pool.submit(by_role, client, cache_id)
        while server.health()["n_turns"] == 0:
            time.sleep(0.01)
        os.kill(engine.pid, signal.SIGKILL)
        with pytest.raises(openai.InternalServerError, match="restarted"):
            turn.result()
    server.wait_ready(epoch + 1)
    wait_status(client, cache_id)
    after = by_role(client, cache_id)
    assert after.choices[0].message.content == before.choices[0].message.content
    assert after.usage.cached_tokens == before.usage.cached_tokens > 0


def test_a_stopped_engine_answers_503_with_retry_after_until_it_is_back(start):
    server = start()
    client = server.client("one")
    engine_process(server).kill()
    seen = []
    for _ in range(200):
        try:
            client.chat.completions.create(
                model="moonshot-v1", messages=[{"role": "user", "content": "x"}], max_tokens=1
            )
        except openai.InternalServerError as error:
            seen.append((error.status_code, error.body["type"], int(error.response.headers["retry-after"]) > 0))
        else:
            break
        time.sleep(0.02)
    assert set(seen) == {(503, "engine_overloaded_error", True)}


def test_overload_is_refused_before_any_work(start):
    config = """
[model]
engine = "scripted"
name = "scripted"
[limits]
turns_max = 2
turns_per_organisation_max = 2
"""
    server = start(config)
    client = server.client("one")
    ask = {"model": "scripted", "messages": [{"role": "user", "content": TEXT}], "temperature": 1.0}
    refused = []

    def turn():
        try:
            for _ in range(30):
                client.chat.completions.create(**ask, max_tokens=200)
        except openai.RateLimitError as error:
            refused.append(error)

    threads = [threading.Thread(target=turn) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert refused
    for error in refused:
        assert error.body["type"] == "engine_overloaded_error"
        assert int(error.response.headers["retry-after"]) >= 1
    assert server.wait_idle()["n_turns"] == 0
