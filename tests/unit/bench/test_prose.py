import pytest

from keepwarm.bench.prose import Prose, sentences

DOCUMENT = """# A heading

The first sentence of the document is here. The second one `has code` and a [link](https://example.org/page) in it!

```python
this_is_code = "and code is no prose at all, however long it is"
```

The first sentence of the document is here. Short one.

- An item that is long enough to count as a sentence; and another half that is long enough, too.
"""


def count_words(text: str) -> int:
    return len(text.split())


def test_sentences_have_no_code_no_markup_and_no_repetition() -> None:
    assert sentences(DOCUMENT) == [
        "The first sentence of the document is here.",
        "The second one has code and a link in it!",
        "- An item that is long enough to count as a sentence;",
        "and another half that is long enough, too.",
    ]


@pytest.mark.parametrize("n_tokens", [3, 10, 37, 500])
def test_a_passage_is_as_long_as_asked(n_tokens: int) -> None:
    assert count_words(Prose(DOCUMENT, count_words).passage(1, n_tokens)) == n_tokens


def test_a_passage_of_characters_is_never_longer() -> None:
    text = Prose(DOCUMENT, len).passage(1, 300)
    assert 300 - len("sentence.") <= len(text) <= 300


def test_the_same_seed_gives_the_same_text_and_another_seed_begins_differently() -> None:
    prose = Prose(DOCUMENT, count_words)
    assert prose.passage(1, 50) == Prose(DOCUMENT, count_words).passage(1, 50)
    assert prose.passage(1, 50).split()[:2] != prose.passage(2, 50).split()[:2]
    assert prose.passage(1, 50).split()[2:] != prose.passage(2, 50).split()[2:]


def test_questions_have_the_length_asked_for_and_differ_from_the_first_token_on() -> None:
    prose = Prose(DOCUMENT, count_words)
    questions = [prose.question(seed, 16) for seed in range(1, 9)]
    assert {count_words(question) for question in questions} == {16}
    assert len({question.split()[0] for question in questions}) == len(questions)
