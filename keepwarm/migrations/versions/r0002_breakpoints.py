"""Breakpoints with a lifetime; marks inside stored messages become objects, since they may have one now."""

import msgspec
import sqlalchemy as sa
from alembic import op

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
    objects = sa.table("cache_objects", sa.column("seq", sa.Integer), sa.column("messages", sa.LargeBinary))
    for seq, messages in connection.execute(sa.select(objects.c.seq, objects.c.messages)).all():
        changed = msgspec.json.encode(_with_mark_objects(msgspec.json.decode(messages)))
        connection.execute(sa.update(objects).where(objects.c.seq == seq).values(messages=changed))


def _with_mark_objects(messages: list[dict[str, list[dict[str, object]]]]) -> list[dict[str, list[dict[str, object]]]]:
    for message in messages:
        for part in message["parts"]:
            part["mark"] = {"ttl_s": None} if part.get("mark") else None
    return messages
