"""What happens in a round, drawn from its seed: the clients' operations, when a process is killed, and which.

Pure: the same seed and round give the same plan on every machine. Objects are picked by a fraction of the list of those
known at that moment, since their ids are the server's own. The kill is anchored to the load's progress (so many answers,
then a short delay), so that it falls into the same part of the load on a fast machine and on a slow one.
"""

import random
from enum import Enum

from msgspec import Struct

N_CLIENTS = 4
OPERATIONS_MAX = 40  # of one client in a round; the kill comes earlier
ANSWERS_MAX = 60  # the kill comes after at most so many answers of all clients together
DELAY_S_MAX = 0.08
KEYS = ("sk-crash-one", "sk-crash-two")  # with --dev each key is a tenant
N_ROOTS, N_TAILS, N_QUESTIONS = 6, 4, 4
TTLS_S = (2, 3, 5, 60, 120, 600)
RESETS_S = (2, 4, 60, 300)
AGAIN_SHARE = 0.2  # of rounds in which the engine is killed once more while it comes back
AGAIN_S_MAX = 1.5
WORDS = (
    "river",
    "stone",
    "engine",
    "letter",
    "garden",
    "window",
    "signal",
    "table",
    "mountain",
    "paper",
    "winter",
    "market",
    "bridge",
    "kernel",
)
AT_READY_SHARE = 0.4  # of rounds in which the kill comes at once when an object is told as ready
CARRY_ON_SHARE = 0.5  # of rounds without a gateway's kill in which the clients go on while the engine is away


class Act(Enum):
    """What a client does. Weights in `WEIGHTS`."""

    CREATE = "create"
    GET = "get"
    USE = "use"
    RESET = "reset"
    DELETE = "delete"
    CHAT = "chat"
    LEAVE = "leave"  # a streamed chat whose client goes away at the first byte


class Victim(Enum):
    """Who gets SIGKILL. The engine's process ends with its gateway in any case."""

    ENGINE = "engine"
    GATEWAY = "gateway"
    ENGINE_THEN_GATEWAY = "engine, gateway"
    GATEWAY_THEN_ENGINE = "gateway, engine"


WEIGHTS = {
    Act.CREATE: 5,
    Act.GET: 4,
    Act.USE: 6,
    Act.RESET: 2,
    Act.DELETE: 2,
    Act.CHAT: 5,
    Act.LEAVE: 1,
}


class Operation(Struct, frozen=True):
    """One call of a client. `pick` in [0, 1) chooses the object where one is needed; unused members play no part."""

    act: Act
    pick: float
    text: int  # of `object_text`
    question: int
    ttl_s: int


class Round(Struct, frozen=True):
    """A round's plan. `clients[i]` is what client i does, in order, with the key `KEYS[i % 2]`."""

    clients: tuple[tuple[Operation, ...], ...]
    victim: Victim
    n_answers: int  # the kill comes when the clients have got so many, or are done,
    delay_s: float  # and this much later
    again_s: float | None  # the engine is killed once more this long after the restart has begun
    carry_on: bool
    at_ready: bool  # wait for the next object to be told as ready instead of for `delay_s`


def plan_round(seed: int, number: int) -> Round:
    """The plan of one round of a run."""
    draw = random.Random(f"{seed} {number}")
    clients = tuple(tuple(_operation(draw) for _ in range(OPERATIONS_MAX)) for _ in range(N_CLIENTS))
    victim = draw.choice(list(Victim))
    return Round(
        clients,
        victim,
        n_answers=draw.randrange(ANSWERS_MAX),
        delay_s=draw.uniform(0, DELAY_S_MAX),
        again_s=draw.uniform(0, AGAIN_S_MAX) if draw.random() < AGAIN_SHARE else None,
        carry_on=draw.random() < CARRY_ON_SHARE,
        at_ready=draw.random() < AT_READY_SHARE,
    )


def _operation(draw: random.Random) -> Operation:
    (act,) = draw.choices(list(WEIGHTS), list(WEIGHTS.values()))
    return Operation(
        act,
        pick=draw.random(),
        text=draw.randrange(N_ROOTS * N_TAILS),
        question=draw.randrange(N_QUESTIONS),
        ttl_s=draw.choice(RESETS_S if act is Act.RESET else TTLS_S),
    )


def object_text(number: int) -> str:
    """A text of the pool: one of a few beginnings that many share, and an end. 500 to 2,500 bytes."""
    root, tail = divmod(number, N_TAILS)
    return f"{_sentences(root, 60 * (1 + root % 4))} {_sentences(1000 + number, 30 * (1 + tail))}"


def question_text(number: int) -> str:
    """What is asked of a text; the last one is long, so that a turn adds blocks of its own."""
    return f"Question {number}: {_sentences(2000 + number, 6 if number < N_QUESTIONS - 1 else 60)}?"


def _sentences(seed: int, n_words: int) -> str:
    """About `n_words` words, different for every seed."""
    draw = random.Random(seed)
    words: list[str] = []
    while len(words) < n_words:
        a, b, c = draw.sample(WORDS, 3)
        words += f"The {a} keeps a {b} near the {c}, which is number {draw.randrange(1000)}.".split()
    return " ".join(words)
