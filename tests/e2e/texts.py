"""Contexts for end-to-end tests: plain sentences, different for every seed, the same in every run."""

import random

WORDS = (  # noqa: SIM905 - a list of thirty strings is harder to read
    "river stone engine cache letter garden window signal number table mountain paper winter market bridge answer "
    "kernel block prefix token lease server client storage memory thread socket morning harbour captain teacher"
).split()


def context(seed, n_words):
    """About `n_words` words of English-like sentences."""
    rng = random.Random(seed)
    words = []
    while len(words) < n_words:
        a, b, c, d = rng.sample(WORDS, 4)
        words += f"The {a} keeps a {b} near the {c}, and the {d} is number {rng.randrange(1000)}.".split()
    return " ".join(words)
