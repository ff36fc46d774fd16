"""The demo's knowledge base: README.md and docs/*.md, cut at a paragraph to a number of tokens."""

from collections.abc import Callable
from pathlib import Path

from keepwarm.demo import DemoError

ROOT = Path(__file__).parents[2]  # the checkout, when the package is used from one
TOKENS_MIN = 3_000  # less would not show much
TOKENS_MAX = 5_000  # some 15 s of evaluation on two cores; with answer and question well inside an 8k window


def documentation(root: Path = ROOT) -> str:
    """The text of README.md and docs/*.md, in this order. Raises DemoError when they are not there."""
    readme, docs = root / "README.md", root / "docs"
    if not readme.is_file() or not docs.is_dir():
        raise DemoError(
            f"the documentation is not beside the package ({root}); run the demo from a checkout of the project: make demo"
        )
    files = [readme, *sorted(docs.glob("*.md"))]
    return "\n\n".join(file.read_text(encoding="utf-8").strip() for file in files)


def cut(text: str, count_tokens: Callable[[str], int]) -> str:
    """The longest run of paragraphs from the start of `text` with at most TOKENS_MAX tokens.

    `count_tokens` must not shrink when text is added. Raises DemoError when the whole has fewer than TOKENS_MIN.
    """
    paragraphs = text.split("\n\n")
    fits, too_long = 0, len(paragraphs) + 1  # paragraphs known to fit, and known not to
    while too_long - fits > 1:
        middle = (fits + too_long) // 2
        if count_tokens("\n\n".join(paragraphs[:middle])) <= TOKENS_MAX:
            fits = middle
        else:
            too_long = middle
    found = "\n\n".join(paragraphs[:fits])
    n_tokens = count_tokens(found)
    if n_tokens < TOKENS_MIN:
        raise DemoError(f"the documentation comes to {n_tokens:,} tokens; the demo needs {TOKENS_MIN:,}")
    return found
