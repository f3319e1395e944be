"""What Alembic runs for a command; `storage.db.migrate` passes the connection."""

from __future__ import annotations

from alembic import context

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=context.config.attributes.get("metadata"),
    # SQLite alters tables by copying them.
    render_as_batch=True,
    # With explicit BEGIN a revision is all or nothing on SQLite too.
    transactional_ddl=True,
    transaction_per_migration=False,
)
with context.begin_transaction():
    context.run_migrations()
