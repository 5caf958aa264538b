"""The ledger's schema through time. Found by Alembic as a package resource, so it travels with the wheel."""
