"""The public images go in and lie there byte for byte."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

from pydicom.errors import InvalidDicomError
from pydicom.filereader import read_file_meta_info

from pacs.dimse import command as cmd
from tests.support.corpus import files, needs_corpus
from tests.support.datasets import dataset_bytes
from tests.support.dimse import DimseNode, RawPeer

MAX_CONTEXTS = 128


def _claims(path: Path) -> tuple[str, str, str] | None:
    """Return what the File Meta Information says; None where a part is missing."""
    try:
        meta = read_file_meta_info(path)
    except InvalidDicomError:
        return None
    named = (
        meta.get("MediaStorageSOPClassUID"),
        meta.get("TransferSyntaxUID"),
        meta.get("MediaStorageSOPInstanceUID"),
    )
    if not all(named) or "FileMetaInformationGroupLength" not in meta:
        return None
    return str(named[0]), str(named[1]), str(named[2])


@needs_corpus
def test_every_image_is_kept_as_received(tmp_path: Path) -> None:
    by_context: dict[tuple[str, str], list[tuple[str, Path]]] = defaultdict(list)
    for path in files():
        claimed = _claims(path)
        if claimed is not None:
            class_uid, syntax, uid = claimed
            by_context[class_uid, syntax].append((uid, path))
    assert sum(map(len, by_context.values())) > 500
    assert len(by_context) <= MAX_CONTEXTS
    contexts = [
        (2 * number + 1, class_uid, (syntax,))
        for number, (class_uid, syntax) in enumerate(by_context)
    ]
    kept: dict[str, bytes] = {}
    refused: dict[str, int] = {}

    with DimseNode(tmp_path) as node, RawPeer(node.port) as peer:
        peer.associate(contexts)
        for (number, class_uid, _), stored in zip(
            contexts, by_context.values(), strict=True
        ):
            for uid, path in stored:
                body = dataset_bytes(path.read_bytes())
                response = peer.store(
                    uid, body, class_uid=class_uid, context_id=number, fragment=200_000
                )
                status = cmd.number(response, cmd.STATUS)
                if uid in kept:
                    assert status in {0, 0x0111}
                    continue
                if status in {0, 0xB007}:
                    kept[uid] = body
                else:
                    refused[uid] = status
        peer.release()

        # Images without identity, or with another than their File Meta says.
        assert set(refused.values()) == {0xA900}
        assert len(refused) < 20
        assert node.uids() == sorted(kept)
        for uid, body in kept.items():
            assert node.dataset(uid) == body
