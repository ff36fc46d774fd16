"""Keys made by the command line against a server that wants them."""

import json
import subprocess
import sys
import time
import urllib.request

import openai
import pytest

pytestmark = pytest.mark.e2e
ASK = {"model": "scripted", "messages": [{"role": "user", "content": "Hello."}], "max_tokens": 4}


def keepwarm(data_dir, *words):
    command = [sys.executable, "-m", "keepwarm", *words, "--data-dir", str(data_dir)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout


def test_a_key_opens_the_server_until_it_is_revoked(start, tmp_path):
    data_dir = tmp_path / "data"
    server = start(dev=False, data_dir=data_dir)
    shown = keepwarm(data_dir, "keys", "create", "ci")
    key = next(word for word in shown.split() if word.startswith("sk-kw-"))
    assert server.client(key).chat.completions.create(**ASK).choices
    with pytest.raises(openai.AuthenticationError) as caught:
        server.client("sk-kw-wrong").chat.completions.create(**ASK)
    assert caught.value.body["type"] == "invalid_authentication_error"
    assert "sk-kw-wrong" not in str(caught.value)
    for path in data_dir.rglob("*"):
        if path.is_file():
            assert key.encode() not in path.read_bytes(), f"the key is in {path}"
    assert key not in server.log.read_text()
    keepwarm(data_dir, "keys", "revoke", "ci")
    with pytest.raises(openai.AuthenticationError):
        server.client(key).chat.completions.create(**ASK)


def test_caches_are_listed_and_deleted_from_the_command_line(start, tmp_path):
    data_dir = tmp_path / "data"
    server = start(data_dir=data_dir)
    client = server.client("one")
    messages = [{"role": "system", "content": "You know the tides. " * 40}]
    made = client.post("/caching", body={"model": "scripted", "messages": messages, "name": "tides"}, cast_to=object)
    listed = json.loads(keepwarm(data_dir, "caches", "list", "--json"))
    assert [c["id"] for c in listed] == [made["id"]]
    keepwarm(data_dir, "caches", "delete", made["id"])
    with pytest.raises(openai.NotFoundError):
        client.get(f"/caching/{made['id']}", cast_to=object)
    for _ in range(100):
        if server.health()["engine"]["host_bytes_pinned"] == 0:
            break
        time.sleep(0.1)  # the ticker gives pins back once a second
    assert server.health()["engine"]["host_bytes_pinned"] == 0


def test_health_openapi_and_docs_need_no_key(start):
    server = start(dev=False)
    with urllib.request.urlopen(server.url + "/openapi.json") as answer:
        assert json.load(answer)["openapi"].startswith("3.1")
    with urllib.request.urlopen(server.url + "/docs") as answer:
        assert b"/v1/chat/completions" in answer.read()
