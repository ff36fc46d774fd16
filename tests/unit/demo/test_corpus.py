from pathlib import Path

import pytest

from keepwarm.demo import DemoError
from keepwarm.demo.corpus import TOKENS_MAX, TOKENS_MIN, cut, documentation


def words(text: str) -> int:
    return len(text.split())


def paragraphs(*lengths: int) -> str:
    return "\n\n".join(" ".join(["word"] * length) for length in lengths)


def test_this_checkout_has_enough_documentation() -> None:
    text = documentation()
    assert text.startswith("# ")
    assert len(text) > 3 * TOKENS_MIN, "at three characters a token or more"


def test_readme_first_then_docs_by_name(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    for name, text in (("README.md", "one\n"), ("docs/b.md", "three"), ("docs/a.md", "two"), ("docs/c.txt", "no")):
        (tmp_path / name).write_text(text, encoding="utf-8")
    assert documentation(tmp_path) == "one\n\ntwo\n\nthree"


@pytest.mark.parametrize("there", ["README.md", "docs", None])
def test_documentation_that_is_not_there_says_where_to_run(tmp_path: Path, there: str | None) -> None:
    if there == "docs":
        (tmp_path / there).mkdir()
    elif there is not None:
        (tmp_path / there).touch()
    with pytest.raises(DemoError, match="make demo"):
        documentation(tmp_path)


@pytest.mark.parametrize(
    "lengths", [[1000] * 12, [1] * 7000, [4999, 2, 10], [TOKENS_MAX], [TOKENS_MAX, 1], [TOKENS_MIN]]
)
def test_the_cut_is_the_longest_that_fits(lengths: list[int]) -> None:
    found = cut(paragraphs(*lengths), words)
    n = len(found.split("\n\n"))
    assert found == paragraphs(*lengths[:n])
    assert words(found) <= TOKENS_MAX
    assert n == len(lengths) or words(found) + lengths[n] > TOKENS_MAX


@pytest.mark.parametrize("lengths", [[TOKENS_MIN - 1], [100, TOKENS_MAX], [TOKENS_MAX + 1], []])
def test_too_little_to_show_anything(lengths: list[int]) -> None:
    with pytest.raises(DemoError, match=r"the demo needs 3,000"):
        cut(paragraphs(*lengths), words)


def test_the_cut_asks_few_times() -> None:
    asked: list[int] = []

    def count(text: str) -> int:
        asked.append(1)
        return words(text)

    cut(paragraphs(*[10] * 1000), count)
    assert len(asked) <= 12
