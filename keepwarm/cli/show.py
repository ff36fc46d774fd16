"""How values are written for people."""

from datetime import UTC, datetime


def shown_time(unix_s: int) -> str:
    """A time to the second, in UTC."""
    return datetime.fromtimestamp(unix_s, UTC).strftime("%Y-%m-%d %H:%M:%SZ")
