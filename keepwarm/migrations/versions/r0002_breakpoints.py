"""Breakpoints with a lifetime; marks inside stored messages become objects, since they may have one now.

A mark was true or false and is {"ttl_s": null} or null from here on. Objects are rewritten one at a time: all of them
together can be larger than memory.
"""

import msgspec
import sqlalchemy as sa
from alembic import op
from alembic.util import CommandError

revision = "r0002"
down_revision = "r0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "breakpoints",
        sa.Column("tenant", sa.Text, nullable=False),
        sa.Column("digest", sa.LargeBinary, nullable=False),
        sa.Column("n_tokens", sa.Integer, nullable=False),
        sa.Column("position", sa.Integer, nullable=False),
        sa.Column("ttl_s", sa.Integer, nullable=False),
        sa.Column("expires_at", sa.Float, nullable=False),
        sa.PrimaryKeyConstraint("tenant", "digest", name="breakpoints_pk"),
    )
    op.create_index("breakpoints_expires_at_ix", "breakpoints", ["expires_at"])
    connection = op.get_bind()
    objects = sa.table("cache_objects", *(sa.column(name) for name in ("seq", "id", "messages")))
    for seq in connection.execute(sa.select(objects.c.seq)).scalars().all():
        mine = objects.c.seq == seq
        row = connection.execute(sa.select(objects.c.id, objects.c.messages).where(mine)).one()
        connection.execute(sa.update(objects).where(mine).values(messages=_with_mark_objects(row.id, row.messages)))


def _with_mark_objects(object_id: str, raw: bytes) -> bytes:
    try:
        messages = msgspec.json.decode(raw, type=list[dict[str, object]])
        for message in messages:
            parts = msgspec.convert(message["parts"], list[dict[str, object]])
            message["parts"] = [{**part, "mark": {"ttl_s": None} if part.get("mark") else None} for part in parts]
    except (msgspec.MsgspecError, KeyError) as exc:
        raise CommandError(f"the messages of cache_objects row {object_id!r} cannot be read: {exc}") from exc
    return msgspec.json.encode(messages)
