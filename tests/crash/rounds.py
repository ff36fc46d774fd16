"""The rounds of a run: load, kill, restart, check; and what is needed to do a failed one again.

One data directory lives through all rounds. A round's load, victim and moment come from (seed, number); what the threads
and processes make of them does not, so a round is reproduced by its plan and by its start: before each round the data
directory is copied, with the ledger, and the copy of a failed round is kept. `resume` begins from such a copy.
"""

import contextlib
import shutil
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from keepwarm.core.clock import Clock
from keepwarm.launch import LaunchError
from keepwarm.storage import DATABASE_NAME
from tests.crash.checks import Checker, damaged, left_over, pool_violations, recomputed
from tests.crash.client import Api, Client, question_message
from tests.crash.ledger import Known, Ledger
from tests.crash.plan import KEYS, Round, Victim, plan_round
from tests.crash.server import COLD, DISK_BYTES, TESTED, Reference, TestedServer, running

LIVE_MAX = 14  # objects a round leaves to the next; more leases than the budget holds are tried within a round
AGREE_S_MAX = 15.0  # until expired leases are given back and the engine, idle, has told its counters
POLL_S = 0.1
CLIENT_S_MAX = 90.0
LOG_LINES_SHOWN = 60
LEDGER_NAME = "ledger.json"
START_NAME, KEPT_NAME = "round-start", "failed-round"


class RoundFailed(Exception):
    """A promise was broken; the message says which, what had been done, and how to do it again."""


class Report(msgspec.Struct, frozen=True):
    """A round that kept its promises."""

    number: int
    victim: str
    n_answers: int
    n_unanswered: int
    n_ready: int  # objects found ready after the restart, as promised
    n_compared: int  # answers equal to cold ones


class Run:
    """A run's servers and its ledger; made by `opened`."""

    def __init__(
        self,
        seed: int,
        folder: Path,
        server: TestedServer,
        reference: Reference,
        clock: Clock,
        between: Callable[[Path], None],
    ) -> None:
        self._seed, self._folder, self._server, self._reference, self._clock = seed, folder, server, reference, clock
        self._between = between
        self._ledger = Ledger(_read_ledger(server.data_dir))
        self._log_start = 0
        self._ready_at_kill: list[Known] = []

    def round(self, number: int) -> Report:
        """Do one round. Raises RoundFailed."""
        plan = plan_round(self._seed, number)
        self._ledger.begin_round()
        start = self._checkpoint()
        try:
            found, report = self._round(number, plan)
        except LaunchError as exc:
            found, report = [f"the server did not come back: {exc}\n{self._server.log_tail()}"], None
        if found or report is None:
            raise RoundFailed(self._story(number, plan, found, start))
        return report

    def _round(self, number: int, plan: Round) -> tuple[list[str], Report]:
        found = self._load_and_kill(plan)
        n_answers, n_ready = self._ledger.n_answers, len(self._ready_at_kill)
        n_unanswered = len(self._ledger.log()) - n_answers
        checker = Checker(self._server.port, self._ledger, self._reference, self._clock)
        found += checker.objects()
        found += checker.answers(self._ledger.answers())
        found += checker.settle()
        found += recomputed(self._server.log_lines(self._log_start), self._ready_at_kill)
        self._trim()
        found += self._agreement()
        return found, Report(
            number, plan.victim.value, n_answers, n_unanswered, n_ready, len(self._ledger.answers()) + n_ready
        )

    def _load_and_kill(self, plan: Round) -> list[str]:
        """The round's load with its kill in it; returns when the server is ready again and the clients have ended."""
        server, ledger = self._server, self._ledger
        clients = [Client(i, plan.clients[i], server.port, ledger, self._clock) for i in range(len(plan.clients))]
        for client in clients:
            client.start()
        epoch = server.epoch()
        server.aim()
        self._wait_for_moment(plan, clients)
        self._log_start = server.log_end()
        self._ready_at_kill = [entry for entry in ledger.known() if entry.is_ready and not entry.is_deleting]
        if plan.victim is not Victim.ENGINE or not plan.carry_on:
            for client in clients:
                client.stop.set()  # the calls under way are not disturbed by it
        if server.kill(plan.victim):
            self._between(server.data_dir)
            server.start()
            epoch = 0
        if plan.again_s is not None:
            time.sleep(plan.again_s)
            epoch_now = server.epoch()
            if server.kill_engine():
                epoch = epoch_now
        server.wait_ready(epoch)
        return self._joined(clients)

    def _wait_for_moment(self, plan: Round, clients: list[Client]) -> None:
        """Until the moment of the kill, or the end of the load."""
        ledger = self._ledger

        def wait_while(is_early: Callable[[], bool]) -> None:
            while is_early() and any(client.is_alive() for client in clients):
                ledger.answered.wait(POLL_S)

        with ledger.answered:
            wait_while(lambda: ledger.n_answers < plan.n_answers)
            n_ready = ledger.n_ready
            if plan.at_ready:
                wait_while(lambda: ledger.n_ready == n_ready)
        if not plan.at_ready:
            time.sleep(plan.delay_s)

    def _joined(self, clients: list[Client]) -> list[str]:
        found = []
        for client in clients:
            client.join(CLIENT_S_MAX)
            found += [f"{client.name}: a call did not end"] if client.is_alive() else client.complaints
        return found

    def _trim(self) -> None:
        """Delete the oldest objects, so that the next round has room."""
        live = [entry for entry in self._ledger.known() if entry.is_ready]
        for entry in live[: max(0, len(live) - LIVE_MAX)]:
            Api(self._server.port, entry.key).delete(entry.cache_id)
            self._ledger.forget(entry)

    def _agreement(self) -> list[str]:
        """The books and the files agree, once the server is idle and has given back what expired."""
        deadline = time.monotonic() + AGREE_S_MAX
        while True:
            found = self._books()
            if not found or time.monotonic() > deadline:
                return found
            time.sleep(POLL_S)
            self._stir()

    def _stir(self) -> None:
        """Have the engine do a little and come to rest, which is when it tells its counters."""
        Api(self._server.port, KEYS[0]).chat([question_message(0)])

    def _books(self) -> list[str]:
        status = Api(self._server.port, KEYS[0]).call("GET", "/admin/store").body["store"]
        store = self._server.store_dir
        ready = [
            body["id"]
            for key in KEYS
            for body in Api(self._server.port, key).call("GET", "/v1/caching?limit=1000").body["data"]
            if body["status"] == "ready"
        ]
        books = pool_violations(status["pools"], store, DISK_BYTES)
        return books + damaged(status["damaged"]) + left_over(store, ready)

    def _checkpoint(self) -> Path:
        """Copy the data directory, with the ledger beside it. Nothing but expiry changes it meanwhile."""
        start = self._folder / START_NAME
        shutil.rmtree(start, ignore_errors=True)
        copy_data(self._server.data_dir, start)
        (start / LEDGER_NAME).write_bytes(msgspec.json.encode(self._ledger.known()))
        return start

    def _story(self, number: int, plan: Round, found: list[str], start: Path) -> str:
        kept = self._folder / f"{KEPT_NAME}-{number}"
        shutil.rmtree(kept, ignore_errors=True)
        start.rename(kept)
        again = "" if plan.again_s is None else f", the engine again {plan.again_s:.3f} s later"
        moment = "at the next object ready" if plan.at_ready else f"{plan.delay_s:.3f} s"
        done = self._ledger.log()
        lines = [
            f"seed {self._seed}, round {number}: {len(found)} violated",
            *(f"  {line}" for line in found),
            f"killed: {plan.victim.value}, {moment} after {plan.n_answers} answers{again}",
            f"the last of {len(done)} calls:",
            *(f"  {line}" for line in done[-LOG_LINES_SHOWN:]),
            f"to do it again: python -m scripts.crash --seed {self._seed} --only-round {number} --from {kept}",
            "  (leave --from away to begin with an empty store; --repeat N tries several times)",
        ]
        return "\n".join(lines)


@contextmanager
def opened(
    seed: int,
    folder: Path,
    clock: Clock,
    start: Path | None = None,
    between: Callable[[Path], None] = lambda _data_dir: None,
) -> Iterator[Run]:
    """A run with its servers. `start` is a failed round's kept copy; None is an empty store.

    `between` is called with the data directory whenever a gateway is dead and before it is started again: a test can break
    something there and see the round fail.
    """
    tested = TestedServer(folder / "tested", TESTED, clock)
    if start is not None:
        shutil.copytree(start, tested.data_dir)
    with running(TestedServer(folder / "reference", COLD, clock)) as cold, running(tested):
        yield Run(seed, folder, tested, Reference(cold.port), clock, between)


def copy_data(data_dir: Path, to: Path) -> None:
    """Copy a data directory that a server uses: the database by its own means, the store file by file as long as they last."""

    def copy(source: str, target: str) -> str:
        with contextlib.suppress(FileNotFoundError):  # just deleted
            shutil.copy2(source, target)
        return target

    shutil.copytree(data_dir, to, copy_function=copy, ignore=shutil.ignore_patterns(f"{DATABASE_NAME}*"))
    with (
        contextlib.closing(sqlite3.connect(data_dir / DATABASE_NAME)) as source,
        contextlib.closing(sqlite3.connect(to / DATABASE_NAME)) as target,
    ):
        source.backup(target)


def _read_ledger(data_dir: Path) -> list[Known]:
    path = data_dir / LEDGER_NAME
    return msgspec.json.decode(path.read_bytes(), type=list[Known]) if path.exists() else []
