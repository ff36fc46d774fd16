"""Numbers for prefixes of prompts: the same for the same tokens, whatever prompt they are of."""

from collections.abc import Sequence

from blake3 import blake3

from keepwarm.core.prompt import Tokens

BLOCK_TOKENS = 64  # automatic reads end at a multiple of this; what is read is up to 63 tokens less than could be


class PrefixNumbers:
    """Holds a number for every prefix it has seen. Not thread-safe."""

    def __init__(self) -> None:
        self._known: dict[bytes, int] = {}

    def of(self, tokens: Tokens, ends: Sequence[int]) -> dict[int, int]:
        """The number of the prefix that ends at each of `ends`, which are ascending."""
        hasher, found, begin = blake3(), {}, 0
        for end in ends:
            hasher.update(tokens[begin:end].tobytes())
            found[end] = self._known.setdefault(hasher.digest(), len(self._known))
            begin = end
        return found


def block_ends(n_tokens: int) -> range:
    """Where whole blocks of a prompt end."""
    return range(BLOCK_TOKENS, n_tokens + 1, BLOCK_TOKENS)
