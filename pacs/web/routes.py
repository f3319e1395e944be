"""All DICOMweb routers, those asked for most first."""

from __future__ import annotations

from pacs.web import delete, frames, metadata, retrieve, search, store

#: Under ``/dicom-web``.
DICOMWEB = (
    frames.router,
    metadata.router,
    search.router,
    retrieve.router,
    store.router,
    delete.router,
)
#: Under ``/api/v1``.
REST = (retrieve.files,)
