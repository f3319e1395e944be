r"""Character sets: decode first, split after (PS3.3 C.12.1.1.2, PS3.5 6.1).

116 basic hanzi have a GBK second byte of 5CH (``\``) and 116 of 5EH (``^``), so
values are decoded whole before they are split. Bytes that do not decode become
visible, ``<CE>``, without a character that separates values or components; nothing
raises, the stored bytes stay as they are.
"""

from __future__ import annotations

import codecs
import re
import unicodedata
from dataclasses import dataclass
from functools import cache, lru_cache

#: Defined terms that stand alone (PS3.3 Table C.12-2, C.12-5).
_SINGLE = {
    "": "ascii",
    "ISO_IR 6": "ascii",
    "ISO_IR 13": "shift_jis",
    "ISO_IR 100": "latin_1",
    "ISO_IR 101": "iso8859_2",
    "ISO_IR 109": "iso8859_3",
    "ISO_IR 110": "iso8859_4",
    "ISO_IR 126": "iso8859_7",
    "ISO_IR 127": "iso8859_6",
    "ISO_IR 138": "iso8859_8",
    "ISO_IR 144": "iso8859_5",
    "ISO_IR 148": "iso8859_9",
    "ISO_IR 166": "iso8859_11",
    "ISO_IR 192": "utf_8",
    "ISO_IR 203": "iso8859_15",
    "GB18030": "gb18030",
    "GBK": "gb18030",
}
#: Spellings seen in the field, and what was meant.
_MISSPELT = {
    "ISO IR 6": "ISO_IR 6",
    "ISO IR 100": "ISO_IR 100",
    "ISO-IR 100": "ISO_IR 100",
    "ISO_IR_100": "ISO_IR 100",
    "ISO IR 192": "ISO_IR 192",
    "ISO-IR 192": "ISO_IR 192",
    "ISO_IR_192": "ISO_IR 192",
    "UTF-8": "ISO_IR 192",
    "UTF8": "ISO_IR 192",
    "GB 18030": "GB18030",
    "GB-18030": "GB18030",
    "GB2312": "GBK",
    "ISO_IR 58": "ISO 2022 IR 58",
}
#: VRs that hold text in the declared character set (PS3.5 6.1.2.3).
_TEXT_VRS = frozenset(("LO", "LT", "PN", "SH", "ST", "UC", "UT"))


def _visible(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeDecodeError):
        raise error
    raw = error.object[error.start : error.end]
    return "".join(f"<{byte:02X}>" for byte in raw), error.end


#: Escape sequences that stay behind after decoding (PS3.5 6.1.2.5).
_ESCAPES = re.compile("\x1b[$]?[(),./-][0-~]")

codecs.register_error("huying.visible", _visible)


@dataclass(frozen=True, slots=True)
class Charset:
    """How the text of one data set is decoded.

    Attributes
    ----------
    terms : tuple of str
        Specific Character Set (0008,0005), misspellings corrected.
    warning : str
        Empty, or what is wrong with the declaration.
    """

    terms: tuple[str, ...]
    codec: str
    warning: str = ""

    @property
    def is_default(self) -> bool:
        """Whether nothing but the default repertoire, ISO 646, is declared."""
        return self.terms in {("",), ("ISO_IR 6",)}

    def decode(self, raw: bytes, vr: str = "LO") -> str:
        """Return the text of a value; padding and delimiters stay in it."""
        if raw.isascii() and b"\x1b" not in raw:
            return raw.decode("ascii")
        if vr not in _TEXT_VRS:
            return raw.decode("ascii", "huying.visible")
        if self.codec != "iso2022":
            return raw.decode(self.codec, "huying.visible")
        return _decode_iso2022(raw, self.terms, is_name=vr == "PN")


#: Specific Character Set values up to this length are remembered.
_REMEMBERED_BYTES = 256


def decoder(raw: bytes) -> Charset:
    """Return how to decode a data set with this Specific Character Set value."""
    return _decoder(raw) if len(raw) <= _REMEMBERED_BYTES else _made_decoder(raw)


def _made_decoder(raw: bytes) -> Charset:
    declared = [
        term.strip(" \0") for term in raw.decode("ascii", "replace").split("\\")
    ]
    terms = tuple(_MISSPELT.get(term, term) for term in declared)
    warning = "" if list(terms) == declared else "misspelt character set"
    stand_alone = [t for t in terms if t in {"GB18030", "GBK", "ISO_IR 192"}]
    if stand_alone and len(terms) > 1:
        return Charset(
            (stand_alone[0],), _SINGLE[stand_alone[0]], "character set stands alone"
        )
    if any(term.startswith("ISO 2022") for term in terms) or len(terms) > 1:
        return Charset(terms, "iso2022", warning)
    codec = _SINGLE.get(terms[0])
    if codec is None:
        return Charset(terms, "ascii", "unknown character set")
    return Charset(terms, codec, warning)


_decoder = lru_cache(maxsize=256)(_made_decoder)


def _decode_iso2022(raw: bytes, terms: tuple[str, ...], *, is_name: bool) -> str:
    """Decode with code extensions (PS3.3 C.12.1.1.2)."""
    import warnings

    from pydicom.charset import (
        convert_encodings,
        decode_bytes,
    )

    delimiters = {0x0D, 0x0A, 0x09, 0x0C} | ({0x5E, 0x3D} if is_name else set())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            text = decode_bytes(raw, convert_encodings(list(terms)), delimiters)
        except (LookupError, UnicodeError, ValueError):
            return raw.decode("ascii", "huying.visible")
    return _ESCAPES.sub("", text)


def encode(text: str, term: str) -> bytes | None:
    """Return `text` in a stand-alone character set, or None when it does not fit."""
    codec = _SINGLE.get(_MISSPELT.get(term.strip(), term.strip()))
    if codec is None:
        return None
    if term.strip() == "GBK":
        codec = "gbk"
    try:
        return text.encode(codec)
    except UnicodeError:
        return None


def split_values(text: str) -> list[str]:
    """Split decoded text into values, padding stripped."""
    return [value.strip(" \0") for value in text.split("\\")]


def split_person_name(text: str) -> tuple[str, str, str]:
    """Split a decoded PN into alphabetic, ideographic and phonetic groups."""
    groups = [group.strip(" \0") for group in text.split("=")[:3]]
    groups += [""] * (3 - len(groups))
    return groups[0], groups[1], groups[2]


def normalise(text: str) -> str:
    """Fold case, width and accents, for searching names.

    Examples
    --------
    >>> normalise("ＭüLLER^Zoë")
    'muller^zoe'
    """
    if text.isascii():
        return text.lower().strip()
    folded = unicodedata.normalize("NFKD", text).casefold()
    plain = "".join(char for char in folded if not unicodedata.combining(char))
    return unicodedata.normalize("NFC", plain).strip()


@cache
def _pinyin() -> object:
    """Load the dictionary once; it is large and only names with hanzi need it."""
    import pypinyin

    return pypinyin


def _is_hanzi(char: str) -> bool:
    point = ord(char)
    return (
        0x3400 <= point <= 0x4DBF
        or 0x4E00 <= point <= 0x9FFF
        or 0xF900 <= point <= 0xFAFF
        or 0x20000 <= point <= 0x323AF
    )


#: Readings of surnames that differ from the character's usual one.
_SURNAMES = {
    "单": "shan", "解": "xie", "仇": "qiu", "曾": "zeng", "查": "zha", "区": "ou",
    "區": "ou", "任": "ren", "朴": "piao", "盖": "ge", "缪": "miao", "繆": "miao",
    "翟": "zhai", "尉": "wei", "乐": "yue", "樂": "yue", "华": "hua", "洗": "xian",
    "覃": "qin", "种": "chong", "黑": "he", "繁": "po", "折": "she", "宓": "mi",
    "逄": "pang", "员": "yun", "員": "yun", "召": "shao", "能": "nai", "句": "gou",
    "便": "pian", "祭": "zhai", "万俟": "mo qi", "尉迟": "yu chi", "单于": "chan yu",
    "萬俟": "mo qi", "尉遲": "yu chi", "單于": "chan yu", "單": "shan",
    "長孫": "zhang sun", "长孙": "zhang sun",
}  # fmt: skip
#: Surnames of two characters, for names written without a delimiter.
_COMPOUND = frozenset(
    (
        "万俟", "萬俟", "尉迟", "尉遲", "单于", "單于", "长孙", "長孫", "欧阳",
        "歐陽", "司马", "司馬", "上官", "诸葛", "諸葛", "东方", "東方", "皇甫",
        "公孙", "公孫", "慕容", "令狐", "宇文", "司徒", "司空", "夏侯", "轩辕",
        "軒轅", "端木", "百里", "呼延", "南宫", "南宮", "东郭", "東郭", "西门",
        "西門", "澹台", "澹臺", "闻人", "聞人", "独孤", "獨孤", "钟离", "鍾離",
        "太史", "申屠", "仲孙", "仲孫", "赫连", "赫連", "拓跋", "完颜", "完顏",
        "鲜于", "鮮于", "淳于", "濮阳", "濮陽", "公冶", "宗政", "左丘", "东野",
        "羊舌", "微生", "纳兰", "納蘭",
    )
)  # fmt: skip


@lru_cache(maxsize=4096)
def pinyin_keys(name: str) -> str:
    """Return search keys of a person name with hanzi, space separated; else empty.

    Pinyin without tones of each group that holds hanzi: the whole name in one word,
    the given name in one word, the surname, each syllable, and the initials; and the
    hanzi without delimiters. What begins a key is found, whether a name is typed in one
    word or in several.

    Examples
    --------
    >>> pinyin_keys("张^三")
    'zhangsan san zhang zs 张三'
    >>> pinyin_keys("马秀英")
    'maxiuying xiuying ma xiu ying mxy'
    """
    if name.isascii():
        return ""
    keys: dict[str, None] = {}
    for group in name.split("="):
        hanzi = "".join(char for char in group if _is_hanzi(char))
        if not hanzi:
            continue
        syllables = _syllables(hanzi)
        surname = min(_surname_length(group, hanzi), len(syllables))
        given = syllables[surname:]
        made = (
            "".join(syllables),
            "".join(given),
            "".join(syllables[:surname]),
            *syllables,
            "".join(syllable[0] for syllable in syllables),
        )
        for key in made:
            # Passports and typists write u or yu for the v of pinyin.
            keys |= dict.fromkeys((key, key.replace("v", "u"), key.replace("v", "yu")))
        if hanzi != group:
            keys[normalise(hanzi)] = None
    keys.pop("", None)
    return " ".join(keys)


def _surname_length(group: str, hanzi: str) -> int:
    """Return how many characters of `hanzi` are the surname."""
    family, delimiter, _ = group.partition("^")
    if delimiter:
        return sum(map(_is_hanzi, family))
    return 2 if hanzi[:2] in _COMPOUND and len(hanzi) > 2 else 1


_TONED = re.compile(
    r"(?:(?:[zcs]h|[b-df-hj-np-tw-z])?[aeiouv]{1,3}(?:ng|n|r)?[1-5])+", re.ASCII
)


def without_tones(word: str) -> str:
    """Return pinyin without the digits of its tones, any other word as it is.

    Examples
    --------
    >>> without_tones("zhang1san1"), without_tones("test1")
    ('zhangsan', 'test1')
    """
    if word[-1:].isdigit() and _TONED.fullmatch(word):
        return re.sub("[1-5]", "", word)
    return word


def _syllables(hanzi: str) -> list[str]:
    for length in (2, 1):
        surname = _SURNAMES.get(hanzi[:length])
        if surname is not None and len(hanzi[:length]) == length:
            return [*surname.split(), *_read(hanzi[length:])]
    return _read(hanzi)


def _read(hanzi: str) -> list[str]:
    if not hanzi:
        return []
    read: list[str] = _pinyin().lazy_pinyin(hanzi, v_to_u=False, errors="ignore")  # type: ignore[attr-defined]
    return [syllable for syllable in read if syllable]
