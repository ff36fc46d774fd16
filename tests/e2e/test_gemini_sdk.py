"""Google's two SDKs against the real server process on the real model: the flow of Gemini's caching guide, and the rest.

The guide's video is a text here. Cross-dialect: what a Gemini object computed, Kimi's automatic reuse reads.
"""

import datetime as dt
import re
import time

import pytest

from tests.e2e.anthropic_calls import text
from tests.gemini_sdks import caching, exceptions, genai, generativeai, generativeai_client

pytestmark = [pytest.mark.e2e, pytest.mark.real, pytest.mark.timeout(900)]
types = genai.types
MODEL = "gemini-1.5-flash-001"
NOT_FOUND = "CachedContent not found (or permission denied)"
SHORT = types.GenerateContentConfig(max_output_tokens=6, temperature=0)


@pytest.fixture
def google(server):
    def make(key, version=None):
        options = types.HttpOptions(base_url=server.url, api_version=version)
        return genai.Client(api_key=key, http_options=options)

    return make


def config(cached, **more):
    return types.GenerateContentConfig(cached_content=cached, max_output_tokens=6, temperature=0, **more)


def refused(call):
    with pytest.raises(genai.errors.ClientError) as caught:
        call()
    return caught.value


@pytest.mark.parametrize("version", [None, "v1beta"])
def test_the_guides_flow(google, tmp_path, version):
    client = google(f"key-guide-{version}", version)
    path = tmp_path / "report.txt"
    path.write_text(text(31, 1200))
    file = client.files.upload(file=str(path))
    while file.state.name == "PROCESSING":
        time.sleep(0.2)
        file = client.files.get(name=file.name)
    assert (file.state.name, file.mime_type, file.size_bytes) == ("ACTIVE", "text/plain", path.stat().st_size)
    made = client.caches.create(
        model=MODEL,
        config=types.CreateCachedContentConfig(
            display_name="report", system_instruction="You answer about a report.", contents=[file], ttl="300s"
        ),
    )
    lifetime = made.expire_time - made.create_time
    assert dt.timedelta(seconds=299) < lifetime < dt.timedelta(seconds=301)
    answer = client.models.generate_content(model=MODEL, contents="What is it about?", config=config(made.name))
    usage = answer.usage_metadata
    assert usage.cached_content_token_count == made.usage_metadata.total_token_count
    assert usage.prompt_token_count > usage.cached_content_token_count
    assert usage.total_token_count == usage.prompt_token_count + usage.candidates_token_count
    again = "".join(
        chunk.text or ""
        for chunk in client.models.generate_content_stream(
            model=MODEL, contents="What is it about?", config=config(made.name)
        )
    )
    assert again == answer.text
    assert [one.name for one in client.caches.list(config={"page_size": 1})] == [made.name]
    longer = client.caches.update(name=made.name, config=types.UpdateCachedContentConfig(ttl="7200s"))
    assert longer.expire_time - made.expire_time > dt.timedelta(seconds=6000)
    conflict = refused(
        lambda: client.models.generate_content(
            model=MODEL, contents="q", config=config(made.name, system_instruction="Other.")
        )
    )
    assert conflict.code == 400 and conflict.message.startswith("CachedContent can not be used with GenerateContent")
    client.caches.delete(name=made.name)
    for call in (
        lambda: client.caches.get(name=made.name),
        lambda: client.caches.update(name=made.name, config=types.UpdateCachedContentConfig(ttl="60s")),
        lambda: client.caches.delete(name=made.name),
        lambda: client.models.generate_content(model=MODEL, contents="q", config=config(made.name)),
        lambda: list(client.models.generate_content_stream(model=MODEL, contents="q", config=config(made.name))),
    ):
        gone = refused(call)
        assert (gone.code, gone.status, gone.message) == (403, "PERMISSION_DENIED", NOT_FOUND)
    assert list(client.caches.list()) == []
    client.files.delete(name=file.name)
    assert refused(lambda: client.files.get(name=file.name)).code == 403


def test_what_a_cached_content_may_not_be(google):
    client = google("key-small")
    small = refused(
        lambda: client.caches.create(model=MODEL, config=types.CreateCachedContentConfig(contents=["Too short."]))
    )
    assert small.code == 400 and small.message.startswith("Cached content is too small. total_token_count=")
    image = types.Part.from_bytes(data=b"\x89PNG", mime_type="image/png")
    assert refused(lambda: client.models.generate_content(model=MODEL, contents=[image], config=SHORT)).code == 400


def test_counting_models_and_functions(google):
    client = google("key-rest")
    n_tokens = client.models.count_tokens(model=MODEL, contents="What is it about?").total_tokens
    answer = client.models.generate_content(model=MODEL, contents="What is it about?", config=SHORT)
    assert answer.usage_metadata.prompt_token_count == n_tokens
    assert answer.usage_metadata.cached_content_token_count is None
    assert client.models.get(model=MODEL).input_token_limit
    weather = types.FunctionDeclaration(
        name="get_weather",
        description="The weather in a city.",
        parameters=types.Schema(type="OBJECT", properties={"city": types.Schema(type="STRING")}, required=["city"]),
    )
    forced = types.ToolConfig(function_calling_config=types.FunctionCallingConfig(mode="ANY"))
    called = client.models.generate_content(
        model=MODEL,
        contents="What is the weather in Paris?",
        config=types.GenerateContentConfig(
            tools=[types.Tool(function_declarations=[weather])], tool_config=forced, max_output_tokens=60, temperature=0
        ),
    )
    assert [call.name for call in called.function_calls] == ["get_weather"]


def test_an_objects_context_is_read_by_kimis_automatic_reuse_of_its_tenant_only(google, server):
    key, context = "key-cross", text(32, 1200)
    client = google(key)  # it closes with its last name
    made = client.caches.create(
        model=MODEL,
        config=types.CreateCachedContentConfig(system_instruction=context, contents=["What is it about?"], ttl="300s"),
    )
    n_tokens = made.usage_metadata.total_token_count
    messages = [{"role": "system", "content": context}, {"role": "user", "content": "What is it about?"}]
    for tenant, is_read in ((key, True), ("key-stranger", False)):
        answer = server.client(tenant).chat.completions.create(model="m", max_tokens=4, messages=messages)
        assert (answer.usage.prompt_tokens_details.cached_tokens > n_tokens - 64) == is_read


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # its own, about protobuf 5
def test_the_guides_flow_with_the_old_sdk(server, tmp_path, monkeypatch):
    url = f"{server.url}/$discovery/rest"
    monkeypatch.setattr(generativeai_client, "GENAI_API_DISCOVERY_URL", url)
    generativeai.configure(api_key="key-old", transport="rest", client_options={"api_endpoint": server.url})
    path = tmp_path / "report.txt"
    path.write_text(text(33, 1200))
    file = generativeai.upload_file(path=path)
    while file.state.name == "PROCESSING":
        time.sleep(0.2)
        file = generativeai.get_file(file.name)
    assert (file.state.name, file.display_name, file.mime_type) == ("ACTIVE", "report.txt", "text/plain")
    assert (file.size_bytes, file.uri) == (path.stat().st_size, f"{server.url}/v1beta/{file.name}")
    made = caching.CachedContent.create(
        model=f"models/{MODEL}",
        display_name="report",
        system_instruction="You answer about a report.",
        contents=[file],
        ttl=dt.timedelta(minutes=5),
    )
    n_cached = made.usage_metadata.total_token_count
    assert dt.timedelta(seconds=299) < made.expire_time - made.create_time < dt.timedelta(seconds=301)
    model = generativeai.GenerativeModel.from_cached_content(cached_content=made)
    options = {"max_output_tokens": 6, "temperature": 0}
    answer = model.generate_content("What is it about?", generation_config=options)
    assert answer.usage_metadata.cached_content_token_count == n_cached
    assert answer.usage_metadata.prompt_token_count > n_cached
    streamed = model.generate_content("What is it about?", generation_config=options, stream=True)
    assert "".join(chunk.text for chunk in streamed) == answer.text
    assert [(one.name, one.display_name) for one in caching.CachedContent.list()] == [(made.name, "report")]
    expired_at = made.expire_time
    made.update(ttl=dt.timedelta(hours=2))
    assert caching.CachedContent.get(made.name).expire_time - expired_at > dt.timedelta(seconds=6000)
    made.delete()
    for call in (
        lambda: caching.CachedContent.get(made.name),
        lambda: made.update(ttl=dt.timedelta(hours=2)),
        made.delete,
        lambda: model.generate_content("What is it about?", generation_config=options),
        lambda: list(model.generate_content("What is it about?", generation_config=options, stream=True)),
    ):
        with pytest.raises(
            exceptions.Forbidden, match=re.escape(NOT_FOUND)
        ):  # the SDK makes no PermissionDenied of a REST 403
            call()
    assert list(caching.CachedContent.list()) == []
    file.delete()
    with pytest.raises(exceptions.Forbidden):
        generativeai.get_file(file.name)
