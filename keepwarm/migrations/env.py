"""Run by Alembic for every migration; `keepwarm.storage` hands it an open connection that is already in a transaction."""

from alembic import context

context.configure(connection=context.config.attributes["connection"])
with context.begin_transaction():
    context.run_migrations()
