"""Files that clients uploaded. Their bytes and texts are beside the database, in the directory files."""

import sqlalchemy as sa
from alembic import op

revision = "r0004"
down_revision = "r0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "files",
        sa.Column("seq", sa.Integer, nullable=False),
        sa.Column("id", sa.Text, nullable=False),
        sa.Column("tenant", sa.Text, nullable=False),
        sa.Column("dialect", sa.Text, nullable=False),
        sa.Column("key", sa.Text, nullable=False),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("media_type", sa.Text, nullable=False),
        sa.Column("n_bytes", sa.Integer, nullable=False),
        sa.Column("sha256", sa.LargeBinary, nullable=False),
        sa.Column("created_at", sa.Float, nullable=False),
        sa.Column("updated_at", sa.Float, nullable=False),
        sa.Column("expires_at", sa.Float),
        sa.Column("state", sa.Text, nullable=False),
        sa.Column("error", sa.Text),
        sa.PrimaryKeyConstraint("seq", name="files_pk"),
        sa.UniqueConstraint("tenant", "id", name="files_tenant_id_key"),
        sa.UniqueConstraint("key", name="files_key_key"),
        sqlite_autoincrement=True,
    )
    op.create_index("files_tenant_dialect_seq_ix", "files", ["tenant", "dialect", "seq"])
    op.create_index("files_expires_at_ix", "files", ["expires_at"])
