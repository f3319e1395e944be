"""Stock pynetdicom receiving: ``python -m tests.bench.pynetdicom_scp PORT DIR``."""

from __future__ import annotations

import sys
from pathlib import Path

from pynetdicom import AE, AllStoragePresentationContexts, evt
from pynetdicom.dimse_primitives import C_STORE


def main() -> None:
    """Serve until killed; every data set becomes a file, undecoded."""
    port, folder = int(sys.argv[1]), Path(sys.argv[2])

    def store(event: evt.Event) -> int:
        request = event.request
        assert isinstance(request, C_STORE)
        name = folder / f"{request.AffectedSOPInstanceUID}.dcm"
        name.write_bytes(event.encoded_dataset())
        return 0

    entity = AE("STORE")
    entity.supported_contexts = AllStoragePresentationContexts
    entity.start_server(("127.0.0.1", port), evt_handlers=[(evt.EVT_C_STORE, store)])


if __name__ == "__main__":
    main()
