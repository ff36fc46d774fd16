"""The demo in order: one question without a cache, an object, five questions with it, an engine crash, the question again.

Every run asks under a new key, so its first call is cold whatever the data directory holds.
"""

import math
import tempfile
from pathlib import Path

import openai
from rich.console import Console
from rich.markup import escape

from keepwarm.core.clock import Clock, RandomIds, SystemClock
from keepwarm.demo import DemoError
from keepwarm.demo.client import MODEL, Answer, CacheState, Client, Messages
from keepwarm.demo.corpus import cut, documentation
from keepwarm.demo.report import Call, Keeping, keeping_line, last_line, table
from keepwarm.launch import LaunchError, ServerProcess, ending_on_sigterm, serving

INSTRUCTION = "You answer questions about Keepwarm from its documentation, in one or two short sentences.\n\n"
QUESTIONS = (
    "What is Keepwarm?",
    "What is a cache object?",
    "How does the gateway talk to the engine?",
    "Which file holds the configuration?",
    "What happens to a cache object when the engine restarts?",
)
REBUILD_S_MAX = 2.0  # from the new engine's start to its objects being pending
NAME = "keepwarm documentation"


def run(console: Console, *, keep: bool, data_dir: Path | None, serve_options: tuple[str, ...] = ()) -> bool:
    """Tell the story; True when every answer with the cache was the uncached one. Raises DemoError."""
    text = documentation()
    clock = SystemClock()
    with (
        ending_on_sigterm(),
        tempfile.TemporaryDirectory(prefix="keepwarm-demo-") as scratch,
        serving(data_dir or Path(scratch), clock, serve_options) as server,
    ):
        try:
            calls = tell(console, server, text, clock, keep=keep)
        except (DemoError, LaunchError, openai.OpenAIError) as error:
            console.print(server.log_tail(), style="dim", markup=False, highlight=False)
            if isinstance(error, DemoError):
                raise
            if isinstance(error, LaunchError):
                raise DemoError(str(error)) from error
            raise DemoError(f"a call failed: {error}; the server's last words are above") from error
    return all(call.is_equal is not False for call in calls)


def tell(console: Console, server: ServerProcess, text: str, clock: Clock, *, keep: bool) -> list[Call]:
    """The calls in order, each shown as it is answered. Raises DemoError, LaunchError and the SDK's errors."""
    with console.status("starting a server") as status:
        health = server.wait_ready(lambda detail: status.update(f"starting a server: {escape(detail)}"))
    console.print(f"A server is ready at {server.url}")
    key = RandomIds().new("demo-")
    client = Client(server.url, key, clock)
    knowledge = [{"role": "system", "content": cut(INSTRUCTION + text, lambda part: _count(client, part))}]

    calls = [_call(console, client, "no cache", knowledge, QUESTIONS[0])]
    uncached = calls[0].answer

    with console.status("creating a cache object"):
        made = client.create_object(knowledge, NAME)
        made = _wait_object(client, server, made.id)
    console.print(f"The cache object {made.id} is ready: {made.tokens:,} tokens")
    reference = [{"role": "cache", "content": f"cache_id={made.id}"}]
    for n, question in enumerate(QUESTIONS, start=1):
        what, same = f"cached, {n}", uncached if n == 1 else None
        calls.append(_call(console, client, what, reference, question, same, n_object=made.tokens))

    with console.status("restarting the engine's process") as status:
        server.restart_engine(key)
        health = server.wait_ready(lambda detail: status.update(escape(detail)), after_epoch=health.engine.epoch)
        status.update("the engine is back; the object is computed again from its stored messages")
        _wait_rebuilt(client, server, made.id, clock)
    console.print("The engine was restarted, and the object computed again from its stored messages")
    what = "after restart"
    calls.append(_call(console, client, what, reference, QUESTIONS[0], uncached, n_object=made.tokens))

    keeping = Keeping(made.tokens, max(0, math.ceil(clock.now() - made.created_at)))
    console.print(table(calls))
    console.print(keeping_line(calls, keeping), highlight=False)
    if keep:
        console.print(invitation(server.url, key, made.id), markup=False, highlight=False)
    console.print(last_line(calls), style="bold", highlight=False)
    if keep:
        _stay(console, server)
    return calls


def invitation(url: str, key: str, object_id: str) -> str:
    """Calls to try while the server runs."""
    return f"""
Try it while the server runs:

curl {url}/v1/chat/completions -H 'Authorization: Bearer {key}' -H 'Content-Type: application/json' -d \
'{{"model": "{MODEL}", "max_tokens": 48, "messages": [{{"role": "cache", "content": "cache_id={object_id}"}}, \
{{"role": "user", "content": "What is a cache object?"}}]}}'

from openai import OpenAI

client = OpenAI(base_url="{url}/v1", api_key="{key}")
answer = client.chat.completions.create(
    model="{MODEL}",
    max_tokens=48,
    messages=[
        {{"role": "cache", "content": "cache_id={object_id}"}},
        {{"role": "user", "content": "What is a cache object?"}},
    ],
)
print(answer.choices[0].message.content, answer.usage)
"""


def _count(client: Client, text: str) -> int:
    return client.count_tokens([{"role": "system", "content": text}])


def _call(
    console: Console,
    client: Client,
    what: str,
    context: Messages,
    question: str,
    uncached: Answer | None = None,
    *,
    n_object: int = 0,
) -> Call:
    """Ask, show, and compare with the uncached answer to the same question where there is one."""
    with console.status(f"asking, {what}: {escape(question)}"):
        answer = client.ask([*context, {"role": "user", "content": question}])
    console.print(f"[bold]{escape(question)}[/] [dim]({what}, {answer.ttft_ms:,.0f} ms)[/]", highlight=False)
    console.print(f"  {escape(answer.text.strip())}", highlight=False)
    is_equal = None if uncached is None else answer.text == uncached.text
    return Call(what, answer, n_object, is_equal)


def _wait_object(client: Client, server: ServerProcess, object_id: str) -> CacheState:
    """The object when it is ready. Raises DemoError when it cannot become so."""
    state = client.object_state(object_id)
    while state.status == "pending":
        server.pause()
        state = client.object_state(object_id)
    if state.status != "ready":
        why = "" if state.error is None else f" ({state.error.get('message')})"
        raise DemoError(f"the cache object is {state.status}{why} instead of ready; the server's last words are above")
    return state


def _wait_rebuilt(client: Client, server: ServerProcess, object_id: str, clock: Clock) -> None:
    """Wait until the object went through pending to ready; it is pending a moment after the engine is up."""
    deadline = clock.monotonic() + REBUILD_S_MAX
    while client.object_state(object_id).status == "ready" and clock.monotonic() < deadline:
        server.pause()
    _wait_object(client, server, object_id)


def _stay(console: Console, server: ServerProcess) -> None:
    console.print("The server stays up until Ctrl-C")
    try:
        server.wait()
    except KeyboardInterrupt:
        console.print("Stopping the server")
