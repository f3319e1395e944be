"""Database engine, units of work and migrations."""
