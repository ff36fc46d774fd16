import os
from pathlib import Path

import pytest

from keepwarm.bench.store_disk import READ_BYTES, drop_page_cache, filesystem, read_sequentially, write_joined
from keepwarm.core.clock import SystemClock


def test_a_joined_file_is_read_to_its_end(tmp_path: Path) -> None:
    parts = [tmp_path / "a", tmp_path / "b"]
    for part, fill in zip(parts, (b"a", b"b"), strict=True):
        part.write_bytes(fill * READ_BYTES)
    joined = tmp_path / "joined"
    assert write_joined([*parts, parts[0]], joined) == 3 * READ_BYTES
    assert joined.read_bytes() == b"a" * READ_BYTES + b"b" * READ_BYTES + b"a" * READ_BYTES
    for direct in (False, True):
        found = read_sequentially(joined, SystemClock(), direct=direct)
        assert (direct and found is None) or found[0] == 3 * READ_BYTES


def test_a_file_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_sequentially(tmp_path / "none", SystemClock())


def test_dropping_the_page_cache_changes_no_file(tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    kept = tmp_path / "below" / "kept"
    kept.write_bytes(b"kept")
    assert "page" in drop_page_cache(tmp_path, whole=False) or not hasattr(os, "posix_fadvise")
    assert kept.read_bytes() == b"kept"


def test_the_filesystem_has_a_name(tmp_path: Path) -> None:
    assert filesystem(tmp_path)
