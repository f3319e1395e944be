"""Revisions of the index; applied by `storage.db.migrate`.

A revision imports no models: it must do tomorrow what it did when it was written.
Its docstring names what it locks and what it costs per million rows.
"""
