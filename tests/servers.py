"""PostgreSQL and Redis for tests: servers of their own, started once a run in temporary directories, on Unix sockets only.

A test that takes `postgresql_url` or `redis_url` gets an empty database; `any_database` runs it on SQLite and PostgreSQL. Where a server is not installed the test is
skipped and says what to install. Nothing of a server that runs on the machine already is touched.
"""

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
import redis

from keepwarm.storage import database_path

START_S = 60.0  # a start takes less than a second; a machine with other work may take longer
SHORT_DIRECTORY = "/tmp"  # the path of a Unix socket has at most 107 bytes, and pytest's own directories are long
USERS = ("postgres", "nobody")  # PostgreSQL refuses to run as root; the first is there with Debian's package
OWNER = "keepwarm"
DATABASE = "tests"


class PostgreSQL:
    """A cluster in a directory of its own, with fsync on as in earnest. Every local user is let in without a password."""

    def __init__(self, programs: Path, directory: Path, user: str | None) -> None:
        """`user` is who it runs as; None: whoever runs the tests."""
        self._programs = programs
        self._directory = directory
        self._user = user
        self._process: subprocess.Popen[bytes] | None = None

    def create(self) -> None:
        """Make the cluster's files."""
        arguments = ["-D", "data", "-U", OWNER, "-A", "trust", "-E", "UTF8", "--locale=C", "--no-sync"]
        done = self._start("initdb", arguments)
        assert done.wait(timeout=START_S) == 0, self.log()

    def start(self) -> None:
        """Start it and wait until it answers."""
        settings = {"listen_addresses": "", "unix_socket_directories": str(self._directory), "fsync": "on"}
        self._process = self._start(
            "postgres",
            ["-D", "data", *(word for name, value in settings.items() for word in ("-c", f"{name}={value}"))],
        )
        end = time.monotonic() + START_S
        while True:
            try:
                psycopg.connect(self.url("postgres")).close()
                return
            except psycopg.OperationalError:
                assert self._process.poll() is None and time.monotonic() < end, self.log()
                time.sleep(0.02)

    def stop(self, how: signal.Signals = signal.SIGINT) -> None:
        """End it: SIGINT closes connections and shuts down in order, SIGQUIT is a crash. A second call does nothing."""
        if self._process is None:
            return
        self._process.send_signal(how)
        self._process.wait(timeout=START_S)
        self._process = None

    def url(self, database: str) -> str:
        return f"postgresql://{OWNER}@/{database}?host={self._directory}"

    def empty(self, database: str) -> None:
        """Make it as good as new: a new one takes 0.3 s. Whoever is still connected to it is not any more."""
        with psycopg.connect(self.url("postgres"), autocommit=True) as connection:
            connection.execute(f"ALTER ROLE {OWNER} IN DATABASE {database} RESET ALL")
            connected = "SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity WHERE datname = %s"
            connection.execute(connected, [database])
        with psycopg.connect(self.url(database), autocommit=True) as connection:
            connection.execute("DROP SCHEMA public CASCADE; CREATE SCHEMA public")

    def log(self) -> str:
        """What the programs have written."""
        return (self._directory / "log").read_text(encoding="utf-8", errors="replace")

    def _start(self, program: str, arguments: list[str]) -> subprocess.Popen[bytes]:
        as_user = {} if self._user is None else {"user": self._user, "group": _group(self._user), "extra_groups": []}
        with (self._directory / "log").open("ab") as log:
            return subprocess.Popen(
                [self._programs / program, *arguments],
                cwd=self._directory,
                env={"PATH": os.defpath, "LC_ALL": "C", "TZ": "UTC"},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                **as_user,
            )


@pytest.fixture(scope="session")
def postgresql_server() -> Iterator[PostgreSQL]:
    """A running PostgreSQL. A test that stops it starts it again."""
    programs = _postgresql_programs()
    if programs is None:
        pytest.skip("PostgreSQL's server programs are missing (Debian, Ubuntu: apt-get install postgresql)")
    user = _other_user() if os.geteuid() == 0 else None
    if os.geteuid() == 0 and user is None:
        pytest.skip(f"PostgreSQL does not run as root, and there is no user {' or '.join(USERS)}")
    directory = Path(tempfile.mkdtemp(prefix="keepwarm-postgresql-", dir=SHORT_DIRECTORY))
    if user is not None:
        shutil.chown(directory, user, _group(user))
    server = PostgreSQL(programs, directory, user)
    try:
        server.create()
        server.start()
        with psycopg.connect(server.url("postgres"), autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {DATABASE}")
        yield server
    finally:
        server.stop()
        shutil.rmtree(directory)


@pytest.fixture
def postgresql_url(postgresql_server: PostgreSQL) -> str:
    """The URL of an empty database."""
    postgresql_server.empty(DATABASE)
    return postgresql_server.url(DATABASE)


@pytest.fixture(params=["sqlite", "postgresql"])
def any_database(request: pytest.FixtureRequest, tmp_path: Path) -> Path | str:
    """What `Storage.open` is given, once for each kind of database: a path in a directory not made yet, or a URL."""
    if request.param == "sqlite":
        return database_path(tmp_path / "data")
    return str(request.getfixturevalue("postgresql_url"))


@pytest.fixture(scope="session")
def redis_server() -> Iterator[str]:
    """The URL of a running Redis that keeps nothing on disk."""
    program = shutil.which("redis-server")
    if program is None:
        pytest.skip("redis-server is not on PATH (Debian, Ubuntu: apt-get install redis-server)")
    directory = Path(tempfile.mkdtemp(prefix="keepwarm-redis-", dir=SHORT_DIRECTORY))
    socket = directory / "socket"
    arguments = [
        "--port",
        "0",
        "--unixsocket",
        str(socket),
        "--save",
        "",
        "--appendonly",
        "no",
        "--dir",
        str(directory),
    ]
    process = subprocess.Popen([program, *arguments], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    url = f"unix://{socket}"
    try:
        end = time.monotonic() + START_S
        while not _answers(url):
            assert process.poll() is None and time.monotonic() < end, "redis-server does not start"
            time.sleep(0.02)
        yield url
    finally:
        process.terminate()
        process.wait(timeout=START_S)
        shutil.rmtree(directory)


@pytest.fixture
def redis_url(redis_server: str) -> str:
    """The URL of a Redis without keys."""
    with redis.Redis.from_url(redis_server) as client:
        client.flushall()
    return redis_server


def _answers(url: str) -> bool:
    try:
        with redis.Redis.from_url(url) as client:
            return bool(client.ping())
    except redis.ConnectionError:
        return False


def _postgresql_programs() -> Path | None:
    """The directory with initdb and postgres: that of PATH, else the newest of Debian's."""
    found = shutil.which("initdb")
    on_path = [] if found is None else [Path(found).parent]
    debian = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name), reverse=True)
    for directory in (*on_path, *debian):
        if (directory / "initdb").exists() and (directory / "postgres").exists():
            return directory
    return None


def _other_user() -> str | None:
    names = {entry.pw_name for entry in pwd.getpwall()}
    return next((name for name in USERS if name in names), None)


def _group(user: str) -> int:
    return pwd.getpwnam(user).pw_gid
