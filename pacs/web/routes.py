"""All DICOMweb routers, in the order in which they are mounted."""

from __future__ import annotations

from pacs.web import delete, frames, metadata, retrieve, search, store

#: Under ``/dicom-web``.
DICOMWEB = (
    search.router,
    store.router,
    retrieve.router,
    metadata.router,
    frames.router,
    delete.router,
)
#: Under ``/api/v1``.
REST = (retrieve.files,)
