"""Presentation states: what they show, draw and refuse (PS3.3 A.33, C.10)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from pydicom.dataset import Dataset
from pydicom.uid import CTImageStorage

from pacs.rendering.parameters import PNG, Viewport, Wanted, Window
from pacs.rendering.softcopy import references
from storage.kernel.errors import MalformedObject, NotFound, Unsupported
from tests.support.datasets import ct_slice, part10, uid
from tests.support.pictures import header, rendered

SIZE = 40


def image(**more: Any) -> bytes:
    """Return a CT of 40 by 40 pixels whose value is 40 * row + column."""
    ds = ct_slice(size=SIZE, PixelSpacing=None, WindowCenter=800, WindowWidth=1600)
    ds.RescaleIntercept, ds.RescaleSlope = 0, 1
    ds.PixelRepresentation = 0
    ds.PixelData = np.arange(SIZE * SIZE, dtype="<u2").tobytes()
    for name, value in more.items():
        setattr(ds, name, value)
    return part10(ds)


def state(**values: Any) -> Dataset:
    ds = Dataset()
    ds.SOPClassUID = "1.2.840.10008.5.1.4.1.1.11.1"
    reference = Dataset()
    reference.ReferencedSOPClassUID = CTImageStorage
    reference.ReferencedSOPInstanceUID = uid(1, 1, 1)
    series = Dataset()
    series.SeriesInstanceUID = uid(1, 1)
    series.ReferencedImageSequence = [reference]
    ds.ReferencedSeriesSequence = [series]
    voi = Dataset()
    voi.WindowCenter, voi.WindowWidth = 800, 1600
    ds.SoftcopyVOILUTSequence = [voi]
    ds.PresentationLUTShape = "IDENTITY"
    for name, value in values.items():
        setattr(ds, name, value)
    return ds


def area(first: tuple[int, int], last: tuple[int, int], **more: Any) -> Dataset:
    item = Dataset()
    item.DisplayedAreaTopLeftHandCorner = list(first)
    item.DisplayedAreaBottomRightHandCorner = list(last)
    item.PresentationSizeMode = more.get("mode", "SCALE TO FIT")
    item.PresentationPixelAspectRatio = more.get("aspect", [1, 1])
    if "magnification" in more:
        item.PresentationPixelMagnificationRatio = more["magnification"]
    return item


PLAIN = rendered(image())


def test_a_state_that_says_what_the_image_says_shows_the_same() -> None:
    assert (rendered(image(), state=state()) == PLAIN).all()


def test_grey_comes_from_the_state_alone() -> None:
    inverse = rendered(image(), state=state(PresentationLUTShape="INVERSE"))
    assert (inverse.astype(int) + PLAIN - 255 <= 1).all()
    # The image's rescale does not count, nor its MONOCHROME1 (PS3.4 N.2.1).
    other = image(RescaleIntercept=-500, PhotometricInterpretation="MONOCHROME1")
    assert (rendered(other, state=state()) == PLAIN).all()
    rescaled = state(RescaleIntercept=-400, RescaleSlope=1)
    expected = rendered(image(WindowCenter=1200))
    assert (rendered(image(), state=rescaled) == expected).all()
    asked = Wanted(PNG, window=Window(100, 50))
    assert (rendered(image(), asked, state=state()) == rendered(image(), asked)).all()


def test_the_displayed_area_is_cut_turned_and_enlarged() -> None:
    part = state(DisplayedAreaSelectionSequence=[area((11, 6), (30, 15))])
    assert (rendered(image(), state=part) == PLAIN[5:15, 10:30]).all()
    part.ImageRotation, part.ImageHorizontalFlip = 270, "Y"
    turned = np.rot90(PLAIN[5:15, 10:30])[:, ::-1]
    assert (rendered(image(), state=part) == turned).all()
    twice = area((1, 1), (10, 5), mode="MAGNIFY", magnification=2)
    large = state(DisplayedAreaSelectionSequence=[twice])
    assert rendered(image(), state=large).shape == (10, 20)
    wide = state(DisplayedAreaSelectionSequence=[area((-9, 1), (50, 40))])
    shown = rendered(image(), state=wide)
    assert shown.shape == (40, 60)
    assert (shown[:, 10:50] == PLAIN).all()
    assert (shown[:, :10] == 0).all()
    tall = state(DisplayedAreaSelectionSequence=[area((1, 1), (40, 40), aspect=[2, 1])])
    assert rendered(image(), state=tall).shape == (80, 40)


def test_items_for_other_images_are_passed_over() -> None:
    reference = Dataset()
    reference.ReferencedSOPInstanceUID = uid(9, 9, 9)
    other = area((1, 1), (5, 5))
    other.ReferencedImageSequence = [reference]
    mine = area((1, 1), (20, 10))
    both = state(DisplayedAreaSelectionSequence=[other, mine])
    assert rendered(image(), state=both).shape == (10, 20)


def graphic(
    kind: str, points: list[float], units: str = "PIXEL", **more: Any
) -> Dataset:
    item = Dataset()
    item.GraphicAnnotationUnits = units
    item.GraphicDimensions = 2
    item.NumberOfGraphicPoints = min(len(points) // 2, 65_535)
    item.GraphicData, item.GraphicType = points, kind
    item.GraphicFilled = more.get("filled", "N")
    return item


def annotated(*graphics: Dataset, texts: tuple[Dataset, ...] = ()) -> Dataset:
    annotation = Dataset()
    annotation.GraphicLayer = "ONE"
    if graphics:
        annotation.GraphicObjectSequence = list(graphics)
    if texts:
        annotation.TextObjectSequence = list(texts)
    layer = Dataset()
    layer.GraphicLayer, layer.GraphicLayerOrder = "ONE", 1
    layer.GraphicLayerRecommendedDisplayGrayscaleValue = 0xFFFF
    return state(GraphicAnnotationSequence=[annotation], GraphicLayerSequence=[layer])


BLACK = image(PixelData=bytes(2 * SIZE * SIZE))


@pytest.mark.parametrize(
    ("kind", "points", "inside", "outside"),
    [
        ("POLYLINE", [5, 5, 35, 5], [(5, 20)], [(20, 20)]),
        (
            "POLYLINE",
            [5, 5, 35, 5, 35, 35, 5, 35, 5, 5],
            [(20, 35), (35, 9)],
            [(20, 20)],
        ),
        ("INTERPOLATED", [5, 20, 20, 5, 35, 20], [(5, 20)], [(30, 20)]),
        ("CIRCLE", [20, 20, 30, 20], [(20, 30), (10, 20)], [(20, 20)]),
        ("ELLIPSE", [5, 20, 35, 20, 20, 15, 20, 25], [(15, 20), (20, 35)], [(20, 20)]),
        ("POINT", [20, 10], [(10, 20)], [(20, 20)]),
    ],
)
def test_graphics_are_drawn_where_they_are(
    kind: str,
    points: list[float],
    inside: list[tuple[int, int]],
    outside: list[tuple[int, int]],
) -> None:
    shown = rendered(BLACK, state=annotated(graphic(kind, points)))
    for row, column in inside:
        assert shown[row - 1 : row + 2, column - 1 : column + 2].max() == 255
    for row, column in outside:
        assert shown[row - 1 : row + 2, column - 1 : column + 2].max() == 0
    share = [value / SIZE for value in points]
    display = rendered(BLACK, state=annotated(graphic(kind, share, "DISPLAY")))
    assert (display == shown).all()


def test_filled_graphics_are_filled_and_follow_the_picture() -> None:
    square = graphic("POLYLINE", [10, 10, 20, 10, 20, 20, 10, 20, 10, 10], filled="Y")
    made = annotated(square)
    made.ImageRotation = 90
    shown = rendered(BLACK, Wanted(PNG, viewport=Viewport(80, 80)), state=made)
    # (15, 15) of 40 turns to (25, 15), twice as large.
    assert shown[30, 50] == 255
    assert shown[30, 30] == 0


def test_text_is_written_and_its_anchor_joined() -> None:
    item = Dataset()
    item.UnformattedTextValue = "结节 A\r\nB"
    item.BoundingBoxAnnotationUnits = "PIXEL"
    item.BoundingBoxTopLeftHandCorner = [2, 2]
    item.BoundingBoxBottomRightHandCorner = [30, 12]
    item.AnchorPoint, item.AnchorPointVisibility = [35, 35], "Y"
    item.AnchorPointAnnotationUnits = "PIXEL"
    made = annotated(texts=(item,))
    made.SpecificCharacterSet = "ISO_IR 192"
    shown = rendered(BLACK, Wanted(PNG, viewport=Viewport(200, 200)), state=made)
    assert (shown[10:30, 10:120] > 128).sum() > 30
    assert shown[170:178, 170:178].max() == 255


def test_a_bitmap_shutter_and_activated_overlays() -> None:
    mask = np.zeros((SIZE, SIZE), np.bool_)
    mask[10:30, 10:30] = True
    packed = np.packbits(mask.reshape(-1), bitorder="little").tobytes()
    made = state(ShutterShape="BITMAP", ShutterPresentationValue=0x8000)
    made.ShutterOverlayGroup = 0x6000
    for tag, vr, value in (
        (0x60000010, "US", SIZE), (0x60000011, "US", SIZE), (0x60000040, "CS", "G"),
        (0x60000050, "SS", [1, 1]), (0x60000100, "US", 1), (0x60000102, "US", 0),
        (0x60003000, "OW", packed),
    ):  # fmt: skip
        made.add_new(tag, vr, value)
    shown = rendered(image(), state=made)
    assert (shown[mask] == 128).all()
    assert (shown[~mask] == PLAIN[~mask]).all()

    del made.ShutterOverlayGroup, made.ShutterShape
    made.add_new(0x60001001, "CS", "ONE")
    assert (rendered(image(), state=made)[mask] == 255).all()
    del made[0x60001001]
    # What no layer activates is not shown.
    assert (rendered(image(), state=made) == PLAIN).all()


def test_pseudo_colour_goes_through_the_palette_of_the_state() -> None:
    made = state(SOPClassUID="1.2.840.10008.5.1.4.1.1.11.3")
    for number, ramp in ((1, range(256)), (2, range(255, -1, -1)), (3, [7] * 256)):
        made.add_new(0x00281100 + number, "US", [256, 0, 16])
        data = np.array([value << 8 for value in ramp], "<u2").tobytes()
        made.add_new(0x00281200 + number, "OW", data)
    shown = rendered(image(), state=made)
    assert (shown[..., 0] == PLAIN).all()
    assert (shown[..., 1] == 255 - PLAIN).all()


def test_states_that_do_not_apply_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("pacs.rendering.annotation.MAX_POINTS", 200)
    with pytest.raises(Unsupported):
        rendered(image(), state=state(SOPClassUID="1.2.840.10008.5.1.4.1.1.11.4"))
    elsewhere = state()
    series = elsewhere.ReferencedSeriesSequence[0]
    series.ReferencedImageSequence[0].ReferencedSOPInstanceUID = uid(3)
    with pytest.raises(NotFound):
        rendered(image(), state=elsewhere)
    flat = state(DisplayedAreaSelectionSequence=[area((5, 5), (4, 4))])
    endless = annotated(graphic("POLYLINE", [1.0] * 402))
    for made in (flat, endless):
        with pytest.raises(MalformedObject):
            rendered(image(), state=made)


def test_references_are_listed_in_their_order() -> None:
    made = state()
    extra = Dataset()
    extra.ReferencedSOPInstanceUID = uid(2)
    extra.ReferencedFrameNumber = [3, 4]
    made.ReferencedSeriesSequence[0].ReferencedImageSequence.append(extra)
    found = references(header(made))
    assert [one.instance_uid for one in found] == [uid(1, 1, 1), uid(2)]
    assert [one.frames for one in found] == [(), (3, 4)]
    assert {one.series_uid for one in found} == {uid(1, 1)}
