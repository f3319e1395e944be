"""All DICOMweb routers, those asked for most first."""

from __future__ import annotations

from starlette.routing import Route

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
    capabilities.router,
)
capabilities.answer_options(
    route.path
    for one in DICOMWEB
    for route in tuple(one.routes)
    if isinstance(route, Route)
)
#: Under ``/``.
WADO_URI = (wado_uri.router,)
#: Under ``/api/v1``.
REST = (retrieve.files,)
