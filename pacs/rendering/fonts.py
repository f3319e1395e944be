"""Fonts for text in pictures: the machine's own, and what is done without one.

No font is shipped: one with hanzi is ten times as large as the rest of the program.
Chinese is drawn with the first font found below (Debian: ``fonts-noto-cjk``); on a
machine without any, hanzi are written in pinyin, and the answer says so.
"""

from __future__ import annotations

import unicodedata
from functools import cache, lru_cache
from pathlib import Path
from typing import Final

from PIL import ImageFont

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

#: Files with hanzi, and the face in them for simplified Chinese.
CHINESE: Final = (
    ("/usr/share/fonts/opentype/noto/NotoSansCJK-Regular.ttc", 2),
    ("/usr/share/fonts/noto-cjk/NotoSansCJK-Regular.ttc", 2),
    ("/usr/share/fonts/google-noto-sans-cjk-fonts/NotoSansCJK-Regular.ttc", 2),
    ("/usr/share/fonts/google-noto-cjk/NotoSansCJK-Regular.ttc", 2),
    ("/usr/share/fonts/truetype/wqy/wqy-microhei.ttc", 0),
    ("/usr/share/fonts/wqy-microhei/wqy-microhei.ttc", 0),
    ("/usr/share/fonts/truetype/wqy/wqy-zenhei.ttc", 0),
    ("/usr/share/fonts/wqy-zenhei/wqy-zenhei.ttc", 0),
    ("/usr/share/fonts/truetype/droid/DroidSansFallbackFull.ttf", 0),
)
#: Where the names of everyone else are covered: Latin, Greek, Cyrillic, Arabic.
OTHERS: Final = ("/usr/share/fonts/truetype/dejavu/DejaVuSans.ttf",)
#: Characters of one line; longer text says nothing more in a picture.
MAX_LINE: Final = 120


@cache
def chinese_font() -> tuple[str, int] | None:
    """Return file and face of a font with hanzi, or None on a machine without."""
    return next((one for one in CHINESE if Path(one[0]).is_file()), None)


@cache
def _other_font() -> str | None:
    return next((path for path in OTHERS if Path(path).is_file()), None)


def is_chinese(text: str) -> bool:
    """Tell whether a text has characters that only a font with hanzi covers."""
    return any("\u2e80" <= char <= "\uffef" or char > "\U00020000" for char in text)


@lru_cache(maxsize=32)
def font_for(size: int, *, chinese: bool) -> Font:
    """Return a font of so many pixels."""
    found = chinese_font() if chinese else None
    if found is not None:
        return ImageFont.truetype(found[0], size, index=found[1])
    other = _other_font()
    if other is not None:
        return ImageFont.truetype(other, size)
    return ImageFont.load_default(size)


def drawable(text: str) -> tuple[str, bool]:
    """Return a line as it can be drawn, and whether hanzi became pinyin.

    Control characters and what turns the direction of text are left out.
    """
    kept = "".join(
        char if char.isprintable() else " "
        for char in unicodedata.normalize("NFC", text[: 4 * MAX_LINE])
        if unicodedata.category(char) != "Cf"
    )
    line = " ".join(kept.split())[:MAX_LINE]
    if not is_chinese(line) or chinese_font() is not None:
        return line, False
    return pinyin(line)[:MAX_LINE], True


def pinyin(text: str) -> str:
    """Return a text with its hanzi in pinyin, without tones.

    Examples
    --------
    >>> pinyin("王小東 M")
    'Wang Xiao Dong M'
    """
    from pypinyin import lazy_pinyin

    # What is not hanzi comes back as it is.
    parts = lazy_pinyin(text)
    return " ".join(part.strip().capitalize() for part in parts if part.strip())
