"""How long the frames of a series take to be encoded, as sealing would have them."""

from __future__ import annotations

import resource
import time
from concurrent.futures import ThreadPoolExecutor

from pydicom import dcmread

from pacs.imaging.codecs import DecoderPool, DecodeSpec
from pacs.imaging.encoders import HTJ2K_LOSSLESS_RPCL
from pacs.imaging.recode import encoded_frame
from pacs.imaging.syntaxes import EXPLICIT_VR_LE
from storage.kernel.limits import Limits
from tests.bench.measure import Comparison, Sample, Target

#: What a series of 300 slices may take on two cores.
LIMIT_SECONDS = 4.0
LIMIT = "300 in 4 s"
PROCESSES = 2


def htj2k(files: list[str], rounds: int) -> Comparison:
    """Encode a series in HTJ2K, each frame decoded and compared, in two processes."""
    frames = [
        (bytes(ds.PixelData), DecodeSpec(ds.Rows, ds.Columns, 1, 16, ds.BitsStored))
        for ds in map(dcmread, files)
    ]
    made = Comparison(
        f"HTJ2K lossless of a CT series, {PROCESSES} processes",
        "frames",
        [Target(LIMIT, 1, 2)],
        {LIMIT: [Sample(300, 0, LIMIT_SECONDS, 0, 0)] * rounds},
    )
    sizes: list[int] = []
    pool = DecoderPool(Limits(), processes=PROCESSES)

    def encode(one: tuple[bytes, DecodeSpec]) -> int:
        data, spec = one
        return len(encoded_frame(data, EXPLICIT_VR_LE, HTJ2K_LOSSLESS_RPCL, spec, pool))

    try:
        with ThreadPoolExecutor(PROCESSES) as threads:
            # Both processes have started before the first round.
            list(threads.map(encode, frames[:8]))
            for _ in range(rounds):
                before = resource.getrusage(resource.RUSAGE_SELF)
                started = time.perf_counter()
                sizes = list(threads.map(encode, frames))
                seconds = time.perf_counter() - started
                after = resource.getrusage(resource.RUSAGE_SELF)
                spent = (after.ru_utime + after.ru_stime) - (
                    before.ru_utime + before.ru_stime
                )
                raw = sum(len(data) for data, _ in frames)
                made.samples.setdefault("huying", []).append(
                    Sample(len(frames), raw, seconds, spent, 0)
                )
    finally:
        pool.close()
    raw = sum(len(data) for data, _ in frames)
    smaller = raw / sum(sizes)
    made.notes = [f"{smaller:.2f} times smaller; CPU is that of the asking process"]
    return made
