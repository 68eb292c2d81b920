"""How alembic gets at the database: by the connection that `hanse_server.storage.database` gives it."""

from alembic import context

from hanse_server.storage.schema import Record

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=Record.metadata,
    render_as_batch=True,
)
context.run_migrations()
