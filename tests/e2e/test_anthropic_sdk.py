"""The official anthropic SDK, the newest and one of 2025, against the real server process on the real model.

The old one lives in an environment of its own (`make` builds it); what both do is in anthropic_calls.py.
"""

import json
import subprocess
import sys
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import anthropic
import pytest

from tests.e2e.anthropic_calls import SUBJECTS, text

pytestmark = [pytest.mark.e2e, pytest.mark.real, pytest.mark.timeout(900)]
CALLS = Path(__file__).with_name("anthropic_calls.py")
OLD = Path(sys.prefix) / "anthropic-0.75.0" / "bin" / "python"
BUSY = """
[model]
engine = "scripted"
name = "scripted"
[limits]
turns_max = 1
"""


def old_sdk():
    if not OLD.exists():
        pytest.skip("anthropic 0.75.0 is not installed beside this environment; make test installs it")
    return OLD


@pytest.mark.parametrize("subject", SUBJECTS)
@pytest.mark.parametrize("version", ["newest", "0.75.0"])
def test_calls(server, subject, version):
    python = sys.executable if version == "newest" else old_sdk()
    key = f"sk-e2e-{version}-{subject}"  # a tenant of its own: nothing is warm
    mount = "/anthropic" if subject == "passive" else ""
    done = subprocess.run(
        [str(python), str(CALLS), server.url + mount, key, subject],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_retries_until_there_is_room(start):
    server = start(BUSY)
    with (
        anthropic.Anthropic(api_key="sk", base_url=server.url, max_retries=20) as client,
        ThreadPoolExecutor(6) as pool,
    ):
        ask = client.messages.with_raw_response.create
        body = {"model": "scripted", "max_tokens": 64, "messages": [{"role": "user", "content": "Hello."}]}
        answers = list(pool.map(lambda _: ask(**body), range(12)))
    assert all(answer.parse().type == "message" for answer in answers)
    assert sum(answer.retries_taken for answer in answers) > 0


def post(url, body, headers):
    request = urllib.request.Request(url, json.dumps(body).encode(), {"content-type": "application/json", **headers})
    try:
        with urllib.request.urlopen(request, timeout=300) as answer:
            return answer.status, dict(answer.headers), answer.read()
    except urllib.error.HTTPError as refused:
        with refused:
            return refused.code, dict(refused.headers), refused.read()


def test_both_key_headers_and_the_order_of_events_by_hand(server):
    body = {"model": "m", "max_tokens": 4, "stream": True, "messages": [{"role": "user", "content": "Hello."}]}
    for key in ({"x-api-key": "sk-e2e-raw"}, {"authorization": "Bearer sk-e2e-raw"}):
        status, headers, raw = post(server.url + "/v1/messages", body, key)
        assert status == 200
        assert headers["x-keepwarm-cache"].startswith("miss; read=0; cause=below_minimum")
        events = [line.removeprefix("event: ") for line in raw.decode().splitlines() if line.startswith("event: ")]
        assert events[0] == "message_start" and events[-2:] == ["message_delta", "message_stop"]
    status, _, raw = post(server.url + "/v1/messages", body, {})
    assert status == 401 and json.loads(raw)["error"]["type"] == "authentication_error"


def test_a_context_cached_in_one_dialect_is_read_in_another_by_its_tenant_only(server):
    context, question = text(77), "What is it about?"
    system = [{"type": "text", "text": context, "cache_control": {"type": "ephemeral"}}]
    body = {"model": "m", "max_tokens": 4, "system": system, "messages": [{"role": "user", "content": question}]}
    _, _, raw = post(server.url + "/v1/messages", body, {"x-api-key": "sk-e2e-cross"})
    created = json.loads(raw)["usage"]["cache_creation_input_tokens"]
    assert created > 600
    messages = [{"role": "system", "content": context}, {"role": "user", "content": "And who wrote it?"}]
    for mount in ("/v1", "/openai/v1", "/minimax/v1"):
        client = server.client("sk-e2e-cross", mount)
        answer = client.chat.completions.create(model="m", max_tokens=4, messages=messages)
        assert answer.usage.prompt_tokens_details.cached_tokens >= created - 8
    stranger = server.client("sk-e2e-other", "/v1").chat.completions.create(model="m", max_tokens=4, messages=messages)
    assert stranger.usage.prompt_tokens_details.cached_tokens < 64
