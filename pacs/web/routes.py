"""All DICOMweb routers, those asked for most first."""

from __future__ import annotations

from pacs.web import (
    capabilities,
    count,
    delete,
    frames,
    metadata,
    rendered,
    retrieve,
    search,
    store,
    wado_uri,
)

#: Under ``/dicom-web``.
DICOMWEB = (
    frames.router,
    metadata.router,
    # Before what takes the last part of a path for a UID.
    count.router,
    search.router,
    rendered.router,
    retrieve.router,
    store.router,
    delete.router,
    # Last: its OPTIONS takes any path.
    capabilities.router,
)
#: Under ``/``.
WADO_URI = (wado_uri.router,)
#: Under ``/api/v1``.
REST = (retrieve.files,)
