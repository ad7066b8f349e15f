"""What alembic runs: the migrations, over the connection and in the transaction it is given."""

from alembic import context

from coordinator import schema

context.configure(
    connection=context.config.attributes["connection"], target_metadata=schema.metadata
)
context.run_migrations()
