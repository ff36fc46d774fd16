import ast
import json
import shlex

from keepwarm.demo.story import invitation


def test_the_invitation_can_be_pasted() -> None:
    text = invitation("http://127.0.0.1:8080", "demo-key", "cache-abc")
    [curl] = [line for line in text.splitlines() if line.startswith("curl ")]
    words = shlex.split(curl)
    assert words[1] == "http://127.0.0.1:8080/v1/chat/completions"
    assert "Authorization: Bearer demo-key" in words
    assert json.loads(words[-1])["messages"][0] == {"role": "cache", "content": "cache_id=cache-abc"}
    snippet = text[text.index("from openai") :]
    ast.parse(snippet)
    assert '"cache_id=cache-abc"' in snippet
