"""Character sets: the standard's examples, Chinese in all its encodings, pinyin."""

from __future__ import annotations

import warnings

import pydicom
import pytest

from pacs.imaging.charset import (
    decoder,
    encode,
    normalise,
    pinyin_keys,
    split_person_name,
    split_values,
    without_tones,
)
from tests.support.corpus import CORPUS, needs_corpus

#: Names of the standard's examples (PS3.5 Annexes H to K) and of the Chinese files.
NAMES = {
    "chinese-gb18030-rare": None,
    "chrArab": "قباني^لنزار",
    "chrFren": "Buc^Jérôme",
    "chrFrenMulti": "Buc^Jérôme",
    "chrGerm": "Äneas^Rüdiger",
    "chrGreek": "Διονυσιος",
    "chrH31": "Yamada^Tarou=山田^太郎=やまだ^たろう",
    "chrH32": "ﾔﾏﾀﾞ^ﾀﾛｳ=山田^太郎=やまだ^たろう",
    "chrHbrw": "שרון^דבורה",
    "chrI2": "Hong^Gildong=洪^吉洞=홍^길동",
    "chrJapMulti": "やまだ^たろう",
    "chrJapMultiExplicitIR6": "やまだ^たろう",
    "chrKoreanMulti": "김희중",
    "chrRuss": "Люкceмбypг",
    "chrX1": "Wang^XiaoDong=王^小東=",
    "chrX2": "Wang^XiaoDong=王^小东=",
}


@needs_corpus
@pytest.mark.parametrize(("name", "expected"), NAMES.items())
def test_names_of_the_corpus(name: str, expected: str | None) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ds = pydicom.dcmread(CORPUS / "charsets" / f"{name}.dcm")
        raw = ds.get_item(0x00100010)
        charset = ds.get_item(0x00080005)
    assert raw is not None
    assert charset is not None
    value = raw.value if isinstance(raw.value, bytes) else raw.value.original_string
    term = charset.value
    if not isinstance(term, bytes):
        term = "\\".join([term] if isinstance(term, str) else term).encode()
    decoded = decoder(term).decode(value, "PN").rstrip(" \0")
    if expected is None:
        assert "<" not in decoded
        assert max(map(ord, decoded)) > 0x3400
    else:
        assert decoded == expected


@pytest.mark.parametrize("term", [b"GB18030", b"GBK "])
@pytest.mark.parametrize("second", [0x5C, 0x5E, 0x3D])
def test_every_hanzi_with_a_delimiter_as_second_byte(term: bytes, second: int) -> None:
    charset = decoder(term)
    checked = 0
    for first in range(0x81, 0xFF):
        raw = bytes((first, second))
        try:
            expected = raw.decode("gbk")
        except UnicodeDecodeError:
            continue
        checked += 1
        assert charset.decode(b"A^" + raw + b"\\B", "PN") == f"A^{expected}\\B"
        assert split_values(charset.decode(raw + b"\\" + raw)) == [expected] * 2
    assert checked == 0 if second == 0x3D else checked > 100


@pytest.mark.parametrize("text", ["𠮷野", "㐂", "𬎆𫖮", "\U0002a6d6", "€", "ḿ"])
def test_four_byte_forms_go_both_ways(text: str) -> None:
    raw = encode(text, "GB18030")
    assert raw is not None
    assert decoder(b"GB18030").decode(raw, "PN") == text
    assert decoder(b"GBK").decode(raw, "PN") == text


@pytest.mark.parametrize(
    ("term", "text"),
    [
        ("ISO_IR 100", "Jérôme"), ("ISO_IR 101", "Łódź"), ("ISO_IR 144", "Люк"),
        ("ISO_IR 126", "Διον"), ("ISO_IR 127", "قباني"), ("ISO_IR 138", "שרון"),
        ("ISO_IR 148", "Çağrı"), ("ISO_IR 166", "สมชาย"), ("ISO_IR 203", "€"),
        ("ISO_IR 13", "ﾔﾏﾀﾞ"), ("ISO_IR 192", "王^伟"), ("GB18030", "王^伟"),
        ("GBK", "王^伟"), ("ISO_IR 109", "Ġorġ"), ("ISO_IR 110", "Šiauliai"),
    ],
)  # fmt: skip
def test_single_byte_and_stand_alone_sets(term: str, text: str) -> None:
    raw = encode(text, term)
    assert raw is not None
    made = decoder(term.encode())
    assert made.decode(raw) == text
    assert made.warning == ""


def test_gb2312_with_code_extensions() -> None:
    """PS3.5 Annex K."""
    charset = decoder(b"\\ISO 2022 IR 58")
    raw = b"Zhang^XiaoDong=\x1b$)A\xd5\xc5^\x1b$)A\xd0\xa1\xb6\xab="
    assert charset.decode(raw, "PN") == "Zhang^XiaoDong=张^小东="
    text = b"\x1b$)A\xd5\xc5\r\n\x1b$)A\xd0\xa1 is here"
    assert charset.decode(text, "LT") == "张\r\n小 is here"


@pytest.mark.parametrize(
    ("declared", "meant"),
    [
        (b"ISO IR 192", "ISO_IR 192"), (b"UTF-8", "ISO_IR 192"),
        (b"GB 18030", "GB18030"), (b"GB2312", "GBK"), (b"ISO-IR 100", "ISO_IR 100"),
    ],
)  # fmt: skip
def test_a38_misspellings(declared: bytes, meant: str) -> None:
    charset = decoder(declared)
    assert charset.terms == (meant,)
    assert charset.warning


def test_a38_unknown_sets_show_their_bytes() -> None:
    charset = decoder(b"KLINGON")
    assert charset.warning == "unknown character set"
    assert charset.decode(b"A\xce\\B") == "A<CE>\\B"
    assert split_values(charset.decode(b"A\xce\\B")) == ["A<CE>", "B"]


def test_text_of_other_vrs_is_ascii() -> None:
    charset = decoder(b"ISO_IR 192")
    assert charset.decode("é".encode(), "CS") == "<C3><A9>"


def test_default_repertoire() -> None:
    assert decoder(b"").is_default
    assert decoder(b"ISO_IR 6 ").is_default
    assert not decoder(b"ISO_IR 100").is_default


@pytest.mark.parametrize("raw", [b"\xff", b"\x1b", b"\x1b$", b"\x1b$)", b"\x1b(B\xff"])
@pytest.mark.parametrize(
    "term",
    [b"ISO_IR 192", b"GB18030", b"ISO_IR 13", b"\\ISO 2022 IR 87",
     b"\\ISO 2022 IR 149", b"ISO 2022 IR 13\\ISO 2022 IR 159", b"", b"\\\\\\"],
)  # fmt: skip
def test_nothing_raises(term: bytes, raw: bytes) -> None:
    for vr in ("PN", "LO", "LT", "CS", "UI"):
        assert isinstance(decoder(term).decode(b"A" + raw + b"B", vr), str)


def test_encode_says_when_it_cannot() -> None:
    assert encode("王", "ISO_IR 100") is None
    assert encode("王", "ISO 2022 IR 58") is None
    assert encode("𠮷", "GBK") is None


def test_person_names_have_three_groups() -> None:
    assert split_person_name("Wang^Wei=王^伟=wang") == ("Wang^Wei", "王^伟", "wang")
    assert split_person_name("A") == ("A", "", "")
    assert split_person_name("A=B=C=D") == ("A", "B", "C")


@pytest.mark.parametrize(
    ("text", "folded"),
    [("MÜLLER", "muller"), ("ＷＡＮＧ", "wang"), ("Straße", "strasse"), ("ﾔﾏ", "ヤマ"),
     ("王", "王"), (" A ", "a"), ("한국", "한국")],
)  # fmt: skip
def test_folding(text: str, folded: str) -> None:
    assert normalise(text) == folded


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("张^三", {"zhangsan", "zhang", "san", "zs", "张三"}),
        ("Zeng^X=曾^小华", {"zengxiaohua", "zxh"}),
        ("单^田芳", {"shantianfang"}),
        ("单于^明", {"chanyuming"}),
        ("尉迟^恭", {"yuchigong"}),
        ("吕^布", {"lvbu", "lubu", "lyubu", "lv", "lu", "lyu"}),
        ("马秀英", {"maxiuying", "xiuying", "ma", "xiu", "ying", "mxy"}),
        ("Ma^Xiuying=马^秀英", {"maxiuying", "xiuying", "ma", "mxy"}),
        ("欧阳小明", {"ouyang", "xiaoming", "oyxm"}),
        ("欧阳^小明", {"ouyang", "xiaoming", "oyxm"}),
        ("欧阳", {"ouyang", "ou", "yang"}),
        ("长孙^无忌", {"zhangsun", "wuji"}),
        ("Smith^John", set()),
        ("", set()),
    ],
)
def test_pinyin(name: str, wanted: set[str]) -> None:
    keys = set(pinyin_keys(name).split())
    assert wanted <= keys
    assert bool(keys) == bool(wanted)


@pytest.mark.parametrize(
    ("word", "bare"),
    [("zhang1", "zhang"), ("xiu4ying1", "xiuying"), ("lv3", "lv"), ("er2", "er"),
     ("test1", "test1"), ("pid1", "pid1"), ("1", "1"), ("", ""), ("zhang6", "zhang6")],
)  # fmt: skip
def test_digits_of_tones(word: str, bare: str) -> None:
    assert without_tones(word) == bare
