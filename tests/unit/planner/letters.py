"""Traffic made of letters, each one a block: what two prompts share can be seen."""

from hypothesis import strategies as st

from keepwarm.planner.traffic import Chain, Traffic, traced

BLOCK = 10


def chains_of(words: list[tuple[float, str, int]]) -> list[Chain]:
    """Prompts from (seconds since the one before, letters, tokens more), a letter being a block."""
    numbers: dict[str, int] = {}
    chains, now = [], 0.0
    for wait_s, word, rest in words:
        now += wait_s
        blocks = tuple(numbers.setdefault(word[: k + 1], len(numbers)) for k in range(len(word)))
        chains.append(Chain(now, len(word) * BLOCK + rest, blocks))
    return chains


def traffic_of(words: list[tuple[float, str, int]]) -> Traffic:
    return traced("made", BLOCK, chains_of(words))


WORDS = st.lists(
    st.tuples(st.integers(0, 6).map(float), st.text("ab", min_size=1, max_size=6), st.integers(1, BLOCK - 1)),
    min_size=1,
    max_size=25,
)


def common_blocks(left: str, right: str) -> int:
    n = 0
    while n < min(len(left), len(right)) and left[n] == right[n]:
        n += 1
    return n
