"""API keys, cache objects and their tags.

A revision is never edited after a release: it is what databases out there were made with. So it repeats the tables
instead of importing them from keepwarm.storage; a test compares the two.
"""

import sqlalchemy as sa
from alembic import op

revision = "r0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "api_keys",
        sa.Column("seq", sa.Integer, nullable=False),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("tenant", sa.Text, nullable=False),
        sa.Column("digest", sa.LargeBinary, nullable=False),
        sa.Column("last4", sa.Text, nullable=False),
        sa.Column("created_at", sa.Integer, nullable=False),
        sa.Column("revoked_at", sa.Integer),
        sa.PrimaryKeyConstraint("seq", name="api_keys_pk"),
        sa.UniqueConstraint("digest", name="api_keys_digest_key"),
    )
    op.create_index(
        "api_keys_live_name_ix",
        "api_keys",
        ["name"],
        unique=True,
        sqlite_where=sa.text("revoked_at IS NULL"),
        postgresql_where=sa.text("revoked_at IS NULL"),
    )
    op.create_table(
        "cache_objects",
        sa.Column("seq", sa.Integer, nullable=False),
        sa.Column("id", sa.Text, nullable=False),
        sa.Column("tenant", sa.Text, nullable=False),
        sa.Column("model", sa.Text, nullable=False),
        sa.Column("status", sa.Text, nullable=False),
        sa.Column("generation", sa.Integer, nullable=False),
        sa.Column("created_at", sa.Integer, nullable=False),
        sa.Column("expires_at", sa.Integer, nullable=False),
        sa.Column("n_tokens", sa.Integer, nullable=False),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("description", sa.Text, nullable=False),
        sa.Column("metadata", sa.LargeBinary),
        sa.Column("error", sa.Text),
        sa.Column("tools", sa.LargeBinary, nullable=False),
        sa.Column("messages", sa.LargeBinary, nullable=False),
        sa.PrimaryKeyConstraint("seq", name="cache_objects_pk"),
        sa.UniqueConstraint("id", name="cache_objects_id_key"),
        sa.UniqueConstraint("tenant", "id", name="cache_objects_tenant_id_key"),
        sqlite_autoincrement=True,
    )
    op.create_index("cache_objects_tenant_created_at_seq_ix", "cache_objects", ["tenant", "created_at", "seq"])
    op.create_index("cache_objects_status_expires_at_ix", "cache_objects", ["status", "expires_at"])
    op.create_table(
        "cache_tags",
        sa.Column("seq", sa.Integer, nullable=False),
        sa.Column("tenant", sa.Text, nullable=False),
        sa.Column("tag", sa.Text, nullable=False),
        sa.Column("object_id", sa.Text, nullable=False),
        sa.Column("created_at", sa.Integer, nullable=False),
        sa.PrimaryKeyConstraint("seq", name="cache_tags_pk"),
        sa.UniqueConstraint("tenant", "tag", name="cache_tags_tenant_tag_key"),
        sa.ForeignKeyConstraint(
            ["tenant", "object_id"],
            ["cache_objects.tenant", "cache_objects.id"],
            name="cache_tags_tenant_object_id_fk",
            ondelete="CASCADE",
        ),
        sqlite_autoincrement=True,
    )
    op.create_index("cache_tags_tenant_created_at_seq_ix", "cache_tags", ["tenant", "created_at", "seq"])
    op.create_index("cache_tags_tenant_object_id_ix", "cache_tags", ["tenant", "object_id"])
