"""The example assistants as a user runs them, against the real server process: a folder, questions typed, answers read."""

import os
import re
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]
ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
SHOWN = re.compile(r"\[(?P<cached>[\d,]+) of (?P<prompt>[\d,]+) prompt tokens from the cache\]")
N_QUESTIONS_MAX = 200


@pytest.fixture
def documents(tmp_path):
    folder = tmp_path / "docs"
    (folder / "more").mkdir(parents=True)
    (folder / "warm.md").write_text("# Warm\n\nKeep it warm. " * 30)
    (folder / "more" / "cold.md").write_text("# Cold\n\nDo not. ")
    (folder / "long.md").write_text("Too long. " * 1_000)
    (folder / "not.txt").write_text("no Markdown")
    return folder


@pytest.fixture(scope="module")
def go_assistant(tmp_path_factory):
    go = shutil.which("go")
    if go is None:
        pytest.skip("no Go compiler on the PATH")
    program = tmp_path_factory.mktemp("go") / "assistant"
    environment = {**os.environ, "GOCACHE": str(program.parent / "cache"), "GOFLAGS": "-mod=readonly"}
    subprocess.run([go, "build", "-o", program, "."], cwd=EXAMPLES / "go", env=environment, check=True)
    return [str(program)]


class Conversation:
    """An assistant at the other end of two pipes."""

    def __init__(self, process):
        self.process = process

    def ask(self, question):
        """(answer, tokens from the cache, tokens of the prompt)"""
        self.process.stdin.write(f"{question}\n")
        self.process.stdin.flush()
        lines = []
        while not (shown := SHOWN.fullmatch(lines[-1] if lines else "")):
            line = self.process.stdout.readline()
            assert line, f"it has ended: {lines}"
            lines.append(line.strip())
        cached, prompt = (int(shown[name].replace(",", "")) for name in ("cached", "prompt"))
        return " ".join(lines[:-1]).strip("> "), cached, prompt


@contextmanager
def started(command, key):
    environment = {**os.environ, "OPENAI_API_KEY": key, "PYTHONPATH": str(ROOT), "NO_PROXY": "127.0.0.1"}
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, text=True
    )
    with process:
        try:
            yield Conversation(process)
        finally:
            process.kill()


def until_read(conversation, client, text="Keep it warm"):
    """Asked until an object with this text is `ready` and has been read. Every answer to the question is the same."""
    answers = set()
    for _ in range(N_QUESTIONS_MAX):
        conversation.ask("/new\nAnd?")  # some time for the object
        answer, cached, _ = conversation.ask("/new\nWhat is warm?")
        answers.add(answer)
        data = client.get("/caching", cast_to=object)["data"]
        is_this = data and text in data[0]["messages"][0]["content"]  # not the one it is going to replace
        if is_this and data[0]["status"] == "ready" and cached >= data[0]["tokens"]:
            assert len(data) == len(answers) == 1
            return data[0], answer
    raise AssertionError("the object was never read")


def check(command, documents, running, key):
    client = running.client(key)
    with started(command, key) as conversation:
        found, answer = until_read(conversation, client)
        content = found["messages"][0]["content"]
        assert content.index("## Document more/cold.md") < content.index("## Document warm.md")
        assert "Too long" not in content
        assert "no Markdown" not in content

        _, _, prompt = conversation.ask("And cold?")
        assert prompt > found["tokens"] + len("What is warm?And cold?")  # the conversation is there

        client.delete(f"/caching/{found['id']}", cast_to=object)
        assert conversation.ask("/new\nWhat is warm?")[0] == answer
        again, same = until_read(conversation, client)
        assert same == answer
        assert again["id"] != found["id"]
        conversation.process.stdin.close()
        assert conversation.process.wait(30) == 0
        assert "long.md" in conversation.process.stderr.read()

    with started(command, key) as conversation:  # the next start finds the object
        assert until_read(conversation, client)[0]["id"] == again["id"]

    (documents / "warm.md").write_text("# Warm\n\nKeep it hot. " * 30)
    with started(command, key) as conversation:
        changed, _ = until_read(conversation, client, "Keep it hot")
        assert changed["id"] != again["id"]


def test_the_assistant_in_python(running, documents, tmp_path):
    command = [sys.executable, str(EXAMPLES / "assistant.py"), str(documents), "--url", f"{running.url}/v1"]
    check([*command, "--chars", "4000", "--book", str(tmp_path / "book.sqlite3")], documents, running, "sk-python")


def test_the_assistant_in_go(go_assistant, running, documents, tmp_path):
    command = [*go_assistant, "-url", f"{running.url}/v1", "-chars", "4000", "-book", str(tmp_path / "book.json")]
    check([*command, str(documents)], documents, running, "sk-go")
