"""A server with prices, and what must hold of its ledger whatever happened. Money is in nano, 10⁻⁹ of a currency."""

import sqlite3
import subprocess
import sys
import time
from collections import Counter
from contextlib import closing
from fractions import Fraction
from math import floor

import psycopg
from psycopg.rows import dict_row

from tests.e2e.conftest import SCRIPTED

WAIT_S = 60.0
POLL_S = 0.002
NEW_USE = ("settle", "creation", "storage")
CLOSING = ("settle", "creation", "release", "expire")
# Whole nano a token, so that what a row must cost is seen at once: and every class has a price of its own.
FRESH, OUTPUT, READ, WRITE, WRITE_LONG, OBJECT_READ, MADE, CALL = 3000, 15000, 300, 3750, 6000, 100, 4000, 700_000
KEPT_A_MINUTE = 50
SHEET = f"""
name = "house"
version = "1"
currency = "USD"
effective_from = 2024-01-01
source = "made up"
[models.all]
input = "{FRESH / 1000}"
output = "{OUTPUT / 1000}"
read = "{READ / 1000}"
write = "{WRITE / 1000}"
write_long = "{WRITE_LONG / 1000}"
[models.all.objects]
creation = "{MADE / 1000}"
storage = "{KEPT_A_MINUTE / 1000}"
storage_per = "minute"
storage_counts = "exact"
call = "{CALL / 1e9}"
read = "{OBJECT_READ / 1000}"
"""


class Books:
    """The database of a server, from outside; `config` is what the server is started with.

    A SQLite file, or with `database_url` a PostgreSQL database; rates are counted in the server, or in a Redis.
    """

    def __init__(self, folder, database_url="", redis_url=""):
        self.data_dir = folder / "data"
        self.database_url = database_url
        self._sheets = folder / "sheets"
        self._sheets.mkdir()
        (self._sheets / "house.toml").write_text(SHEET)
        self.config = (
            f'{SCRIPTED}\n[billing]\nsheets_dir = "{self._sheets}"\n[billing.models]\nscripted = "house/all"\n'
        )
        if redis_url:
            self.config += f'[rates]\nredis_url = "{redis_url}"\n'
        self._config_file = folder / "books.toml"
        self._config_file.write_text(self.config)

    def run(self, *words):
        """`keepwarm WORDS`; what it prints."""
        where = ["--data-dir", str(self.data_dir), "--database-url", self.database_url]
        command = [sys.executable, "-m", "keepwarm", *words, *where]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def new_key(self, organisation, *options):
        """Of a new organisation, which has these options."""
        self.run("orgs", "create", organisation, *options)
        return self.run("keys", "create", f"of-{organisation}", "--org", organisation)

    def open(self):
        """A connection that begins and ends no transaction by itself."""
        if self.database_url:
            return psycopg.connect(self.database_url, autocommit=True, row_factory=dict_row)
        connection = sqlite3.connect(self.data_dir / "keepwarm.db", timeout=WAIT_S, isolation_level=None)
        connection.row_factory = sqlite3.Row
        return closing(connection)

    def read(self, query):
        with self.open() as connection:
            return connection.execute(query).fetchall()

    def rows(self, *kinds):
        rows = self.read("SELECT * FROM ledger_rows ORDER BY seq")
        return [row for row in rows if not kinds or row["kind"] in kinds]

    def let_holds_end(self):
        """Their time passes."""
        with self.open() as connection:
            connection.execute("UPDATE holds SET expires_at = 0")

    def check(self):
        """Sums are those of the rows at any time; every hold is closed once; every amount follows from what was used."""
        rows, sums = self.rows(), {}
        for row in rows:
            account = sums.setdefault((row["organisation"], row["currency"]), Counter())
            for name in ("cash_nano", "voucher_nano", "held_nano"):
                account[name] += row[name]
            assert account["held_nano"] >= 0 and account["voucher_nano"] >= 0, dict(row)
            if row["kind"] in NEW_USE:
                check_use(row)
        kept = {
            (account["organisation"], account["currency"]): account for account in self.read("SELECT * FROM accounts")
        }
        assert kept.keys() == sums.keys()
        for key, account in kept.items():
            assert account["held_nano"] == 0
            for name in ("cash_nano", "voucher_nano", "held_nano"):
                assert account[name] == sums[key][name], (key, name)
        assert self.read("SELECT * FROM holds") == []
        self._check_holds(rows)
        assert "adds up" in self.run("ledger", "verify", "--config", str(self._config_file))

    def _check_holds(self, rows):
        """None is closed twice or not at all, or by another amount; a turn that held costs no more than that."""
        held = {row["turn_id"]: row["held_nano"] for row in rows if row["kind"] == "hold"}
        ends = [row for row in rows if row["held_nano"] < 0]
        assert Counter(row["turn_id"] for row in ends) == Counter(dict.fromkeys((i for i, n in held.items() if n), 1))
        for row in ends:
            assert row["kind"] in CLOSING
            assert row["held_nano"] == -held[row["turn_id"]]
            assert -(row["cash_nano"] + row["voucher_nano"]) <= held[row["turn_id"]], dict(row)
        for kind in ("settle", "creation", "release", "expire"):
            closed = Counter(row["turn_id"] for row in rows if row["kind"] == kind)
            assert set(closed.values()) <= {1}

    def check_storage(self):
        """Every life of an object that is over was paid from its beginning to its end, and no second of it twice."""
        rows = self.rows("storage")
        meters = self.read("SELECT * FROM storage_meters")
        for meter in meters:
            assert meter["is_closed"]
            mine = [row for row in rows if row["id"].startswith(meter["id"] + "/")]
            lived_s = Fraction(meter["ends_at"] - meter["began_at"])
            exact = Fraction(meter["n_tokens"] * KEPT_A_MINUTE) * lived_s / 60
            assert sum(row["n_units"] for row in mine) == floor(lived_s)
            assert sum(row["storage_nano"] for row in mine) == meter["charged_nano"] == floor(exact + Fraction(1, 2))
        assert len(rows) == len({row["id"] for row in rows})
        return meters


def check_use(row):
    """A row of use by itself."""
    classes = ("fresh", "read", "write", "output", "call", "creation", "storage")
    costs = [row[f"{name}_nano"] or 0 for name in classes]
    assert min(costs) >= 0 and (row["repeated_nano"] or 0) <= 0
    assert sum(costs) + (row["repeated_nano"] or 0) == -(row["cash_nano"] + row["voucher_nano"]) >= 0
    if row["kind"] == "creation":
        assert costs == [0, 0, 0, 0, 0, row["n_object"] * MADE, 0]
    if row["kind"] == "settle":
        n_short, n_plain = row["n_write"] - row["n_write_long"], row["n_read"] - row["n_object"]
        assert min(row["n_fresh"], n_short, row["n_write_long"], n_plain, row["n_object"], row["n_output"]) >= 0
        assert costs == [
            row["n_fresh"] * FRESH,
            n_plain * READ + row["n_object"] * OBJECT_READ,
            n_short * WRITE + row["n_write_long"] * WRITE_LONG,
            row["n_output"] * OUTPUT,
            CALL if row["n_object"] else 0,
            0,
            0,
        ]
        n_prompt = row["n_fresh"] + row["n_read"] + row["n_write"]
        assert row["uncached_nano"] == n_prompt * FRESH + row["n_output"] * OUTPUT


def until(found, every_s=POLL_S):
    """What `found` gives once that is true."""
    end = time.monotonic() + WAIT_S
    while not (value := found()):
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(every_s)
    return value
