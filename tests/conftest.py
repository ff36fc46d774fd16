"""What all tests share: the event loop, a guard against blocking it, hypothesis profiles, one data directory, servers."""

from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
from blockbuster import BlockBuster, blockbuster_ctx

pytest_plugins = ["tests.servers"]

# "ci" is the default. It is derandomised: a checkout passes or fails the same way for everybody, so a red run means this
# change. "explore" looks for new failures, by hand or at night: pytest --hypothesis-profile=explore. No deadlines: how
# long an example takes says more about the machine than about the code.
hypothesis.settings.register_profile("ci", derandomize=True, deadline=None, database=None, print_blob=True)
hypothesis.settings.register_profile("explore", max_examples=2_000, deadline=None, print_blob=True)
hypothesis.settings.load_profile("ci")

# (blocked call, file that may make it, functions, why)
MAY_BLOCK: tuple[tuple[str, str, tuple[str, ...], str], ...] = ()


@pytest.fixture
def anyio_backend() -> str:
    """The server runs on asyncio, so async tests do too."""
    return "asyncio"


@pytest.fixture(autouse=True)
def blocking_calls() -> Iterator[BlockBuster]:
    """Fail a test in which code of the package blocks the event loop: one slow call there stops every client."""
    with blockbuster_ctx("keepwarm") as blockbuster:
        for call, file, functions, _why in MAY_BLOCK:
            blockbuster.functions[call].can_block_in(file, set(functions))
        yield blockbuster


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One data directory for all tests that start the real model: weights are prepared and measured once, not per test."""
    return tmp_path_factory.mktemp("data")
