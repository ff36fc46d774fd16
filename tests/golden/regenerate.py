"""Rewrites the golden transcripts' expectations: `python -m tests.golden.regenerate`, from the project's root."""

from tests.golden.transcripts import expectations

for path, text in list(expectations()):
    path.write_text(text, encoding="utf-8")
