"""Previews are judged by their pixels: side, shape, colours, and what is written."""

import builtins
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from fastorgan import preview
from fastorgan.box import Box
from fastorgan.errors import FastorganError, VolumeError
from fastorgan.labels import IGNORE, ORGANS
from fastorgan.preview import PANEL, draw_preview, write_preview
from fastorgan.report import NOTICE
from fastorgan.volume import load_image, read_volume, save_image

LIVER, KIDNEY, SPLEEN, PANCREAS = ORGANS
SHAPE, SPACING = (60, 50, 20), (4.0, 5.0, 8.0)  # x, y, z; the body fills 240 x 250 x 160 mm
# The panels in the order of drawing.
AXIAL_LIVER, CORONAL, SAGITTAL = range(3)
AXIAL_KIDNEY, AXIAL_SPLEEN, AXIAL_PANCREAS = 3, 6, 9


def nifti(data: NDArray[np.generic], orientation: str = "RAS") -> nib.Nifti1Image:
    """An image of data in RAS axes, stored in another orientation."""
    image = nib.Nifti1Image(data, np.diag([*SPACING, 1.0]))
    turn = nib.orientations.ornt_transform(
        nib.orientations.axcodes2ornt("RAS"), nib.orientations.axcodes2ornt(orientation)
    )
    turned: nib.Nifti1Image = image.as_reoriented(turn)
    return turned


def water() -> NDArray[np.int16]:
    return np.full(SHAPE, 0, np.int16)


def two_boxes() -> NDArray[np.uint8]:
    """Liver at the patient's right front, high; spleen at the left back, low. RAS."""
    codes = np.zeros(SHAPE, np.uint8)
    codes[38:53, 30:42, 11:16] = LIVER.code  # x 152 to 212 mm, y 150 to 210 mm, z 88 to 128 mm
    codes[5:15, 5:15, 4:9] = SPLEEN.code
    return codes


def panel(picture: Image.Image, number: int) -> NDArray[np.uint8]:
    """The pixels (height, width, 3) of one panel, found by the layout's own numbers."""
    row, column = divmod(number, 3)
    left = preview._MARGIN + column * (PANEL[0] + preview._GAP)
    top = preview._HEADER + row * (preview._CAPTION + PANEL[1] + preview._GAP) + preview._CAPTION
    return np.asarray(picture)[top : top + PANEL[1], left : left + PANEL[0]]


def extent(pixels: NDArray[np.uint8], colour: tuple[int, int, int]) -> tuple[int, int, int, int]:
    """Top, bottom, left and right of the pixels of exactly this colour."""
    rows, columns = np.nonzero((pixels == colour).all(axis=2))
    assert len(rows), f"no pixel has the colour {colour}"
    return int(rows.min()), int(rows.max()), int(columns.min()), int(columns.max())


def drawn(codes: NDArray[np.uint8], orientation: str = "RAS", **options: Any) -> Image.Image:
    labels = nifti(codes, orientation)
    volume = read_volume(nifti(water(), orientation), "water")
    return draw_preview(volume, np.asarray(labels.dataobj), case="water", **options)


@pytest.fixture
def texts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every line written on the pictures of a test."""
    lines: list[str] = []
    write = preview._Pen.write

    def record(pen: preview._Pen, at: tuple[float, float], text: str, *args: Any) -> float:
        lines.append(text)
        return write(pen, at, text, *args)

    monkeypatch.setattr(preview._Pen, "write", record)
    return lines


def test_the_patients_right_is_on_the_left() -> None:
    picture = drawn(two_boxes())
    top, bottom, left, right = extent(panel(picture, AXIAL_LIVER), LIVER.colour)
    assert right < PANEL[0] / 2  # the liver, at +x
    assert bottom < PANEL[1] / 2  # in front is up
    top, bottom, left, right = extent(panel(picture, AXIAL_SPLEEN), SPLEEN.colour)
    assert left > PANEL[0] / 2
    assert top > PANEL[1] / 2


def test_the_head_is_up_and_the_front_left_in_long_views() -> None:
    codes = two_boxes()
    codes[20:35, 30:42, 4:9] = PANCREAS.code  # in front, low, beside the liver
    picture = drawn(codes)
    liver, pancreas = (extent(panel(picture, CORONAL), organ.colour) for organ in (LIVER, PANCREAS))
    assert liver[1] < pancreas[0]  # above
    assert liver[3] < pancreas[2]  # to the right of the patient
    liver_only = np.where(codes == LIVER.code, codes, 0).astype(np.uint8)
    assert extent(panel(drawn(liver_only), SAGITTAL), LIVER.colour)[3] < PANEL[0] / 2  # in front


def test_contours_lie_where_the_voxels_are() -> None:
    picture = drawn(two_boxes())
    # The axial view is 240 mm wide and 250 mm high, so the panel's height is 250 mm; it is centred.
    zoom = PANEL[1] / 250
    start = (PANEL[0] - round(240 * zoom)) / 2
    top, bottom, left, right = extent(panel(picture, AXIAL_LIVER), LIVER.colour)
    assert left == pytest.approx(start + (240 - 212) * zoom, abs=2)
    assert right == pytest.approx(start + (240 - 152) * zoom, abs=2)
    assert top == pytest.approx((250 - 210) * zoom, abs=2)
    assert bottom == pytest.approx((250 - 150) * zoom, abs=2)


@pytest.mark.parametrize("number", [AXIAL_LIVER, CORONAL, SAGITTAL])
def test_views_keep_the_aspect_ratio(number: int) -> None:
    codes = np.zeros(SHAPE, np.uint8)
    codes[20:40, 16:32, 5:15] = LIVER.code  # 80 x 80 x 80 mm in voxels of 4 x 5 x 8 mm
    top, bottom, left, right = extent(panel(drawn(codes), number), LIVER.colour)
    assert (right - left) == pytest.approx(bottom - top, abs=3)
    assert right - left > 100


@pytest.mark.parametrize("orientation", ["LPS", "RAS", "PIR", "SLA", "ASR", "IAL"])
def test_the_files_orientation_does_not_matter(orientation: str) -> None:
    codes = two_boxes()
    assert np.array_equal(np.asarray(drawn(codes, orientation)), np.asarray(drawn(codes)))


def test_an_oblique_scan_is_drawn_upright() -> None:
    turn = np.deg2rad(20)
    affine = np.diag([*SPACING, 1.0])
    affine[:2, :2] = [[np.cos(turn) * 4, -np.sin(turn) * 5], [np.sin(turn) * 4, np.cos(turn) * 5]]
    image, labels = (nib.Nifti1Image(data, affine) for data in (water(), two_boxes()))
    picture = draw_preview(read_volume(image, "oblique"), np.asarray(labels.dataobj), case="oblique")
    top, bottom, left, right = extent(panel(picture, AXIAL_LIVER), LIVER.colour)
    # A box of 60 x 60 mm that is turned by 20 degrees spans 60 * (cos 20 + sin 20) = 76.9 mm both ways.
    assert (right - left) == pytest.approx(bottom - top, abs=6)
    volume = read_volume(image, "oblique")
    zoom = min(PANEL[0] / (volume.shape[2] * 4), PANEL[1] / (volume.shape[1] * 5))
    assert right - left == pytest.approx(76.9 * zoom, rel=0.12)


def test_only_the_body_is_shown() -> None:
    air = np.full(SHAPE, -1000, np.int16)
    air[15:45, 15:40, :] = 40  # 120 x 125 mm of 240 x 250 mm
    air[:, 2, :] = 40  # the couch
    codes = np.zeros(SHAPE, np.uint8)
    codes[20:40, 20:36, 5:15] = LIVER.code
    picture = draw_preview(read_volume(nifti(air), "air"), codes, case="air")
    top, bottom, _, _ = extent(panel(picture, AXIAL_LIVER), LIVER.colour)
    # 125 mm and 6 mm of room above and below, in voxels of 5 mm, are 29 voxels in the panel's height.
    assert bottom - top == pytest.approx(80 * PANEL[1] / (29 * 5), abs=4)


def test_the_window_is_the_one_of_the_networks() -> None:
    shades = {-250: 0, -200: 0, 50: 128, 300: 255, 400: 255}
    for hu, grey in shades.items():
        volume = read_volume(nifti(np.full(SHAPE, hu, np.int16)), "flat")
        picture = draw_preview(volume, np.zeros(SHAPE, np.uint8), case="flat")
        # Beside the letters and the scale bar.
        assert panel(picture, AXIAL_LIVER)[100, PANEL[0] // 2].tolist() == pytest.approx([grey] * 3, abs=1)


def test_missing_organs_are_listed(texts: list[str]) -> None:
    drawn(two_boxes())
    assert texts.count("not found") == 2
    assert {"Kidney not found", "Pancreas not found"} < set(texts)
    assert "Liver" in texts
    assert "water" in texts
    # 15 x 12 x 5 and 10 x 10 x 5 voxels of 160 mm3.
    assert "144 ml" in texts
    assert "80 ml" in texts
    assert NOTICE in texts


def test_empty_labels_make_a_picture_without_organs(texts: list[str]) -> None:
    picture = drawn(np.zeros(SHAPE, np.uint8))
    assert texts.count("not found") == 4
    for number in range(12):
        pixels = panel(picture, number)
        for organ in ORGANS:
            assert not (pixels == organ.colour).all(axis=2).any()
        assert pixels.std() > 0


def test_unknown_voxels_are_not_drawn() -> None:
    codes = np.full(SHAPE, IGNORE, np.uint8)
    assert np.array_equal(np.asarray(drawn(codes)), np.asarray(drawn(np.zeros(SHAPE, np.uint8))))


def test_a_cut_organ_is_named(texts: list[str]) -> None:
    codes = two_boxes()
    codes[38:53, 30:42, 16:] = LIVER.code
    drawn(codes)
    assert "259 ml, reaches the scan's edge" in texts  # 15 x 12 x 9 voxels


def test_the_box_is_drawn_in_voxels_of_the_volume() -> None:
    # z, y, x: 40 to 120 mm, 75 to 200 mm, 60 to 180 mm.
    box = Box((5.0, 15.0, 15.0), (15.0, 40.0, 45.0))
    codes = two_boxes()
    plain, boxed = drawn(codes), drawn(codes, roi=box)
    changed = np.nonzero((panel(plain, AXIAL_LIVER) != panel(boxed, AXIAL_LIVER)).any(axis=2))
    zoom = PANEL[1] / 250
    start = (PANEL[0] - round(240 * zoom)) / 2
    assert changed[0].min() == pytest.approx((250 - 200) * zoom, abs=1.5)
    assert changed[0].max() == pytest.approx((250 - 75) * zoom, abs=1.5)
    assert changed[1].min() == pytest.approx(start + (240 - 180) * zoom, abs=1.5)
    assert changed[1].max() == pytest.approx(start + (240 - 60) * zoom, abs=1.5)


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 1, 3), (1, 40, 1), (3, 400, 2)])
def test_odd_volumes_can_be_drawn(shape: tuple[int, int, int], tmp_path: Path) -> None:
    codes = np.zeros(shape, np.uint8)
    codes[0, 0, 0] = KIDNEY.code
    image, labels = (nib.Nifti1Image(data, np.eye(4)) for data in (np.zeros(shape, np.int16), codes))
    write_preview(tmp_path / "odd.png", image, labels)
    assert Image.open(tmp_path / "odd.png").size == drawn(two_boxes()).size


def test_files_make_a_png(tmp_path: Path, texts: list[str]) -> None:
    paths = tmp_path / "case7_0000.nii.gz", tmp_path / "case7.nii.gz"
    save_image(nifti(water(), "LPS"), paths[0])
    save_image(nifti(two_boxes(), "LPS"), paths[1])
    image, labels = (load_image(path) for path in paths)
    target = tmp_path / "case7.png"
    target.write_bytes(b"an older picture")
    # A reader that has the older file open keeps it whole: the new one takes its name, not its place.
    with target.open("rb") as reader:
        write_preview(target, image, labels)
        assert reader.read() == b"an older picture"
    with Image.open(target) as picture:
        assert picture.format == "PNG"
        assert np.array_equal(panel(picture.convert("RGB"), CORONAL), panel(drawn(two_boxes()), CORONAL))
    assert "case7_0000" in texts
    assert sorted(path.name for path in tmp_path.iterdir()) == ["case7.nii.gz", "case7.png", "case7_0000.nii.gz"]


def test_float_labels_and_a_fourth_axis_of_one_are_accepted(tmp_path: Path) -> None:
    image = nifti(water())
    for data in (two_boxes().astype(np.float32), two_boxes()[..., None]):
        write_preview(tmp_path / "a.png", image, nib.Nifti1Image(data, image.affine), case="water")
        with Image.open(tmp_path / "a.png") as picture:
            assert np.array_equal(np.asarray(picture), np.asarray(drawn(two_boxes())))


def test_long_names_fit(texts: list[str]) -> None:
    volume = read_volume(nifti(water()), "long")
    draw_preview(volume, two_boxes(), case="study\n" + "1.2.840.113619." * 40)
    title = next(text for text in texts if "113619" in text)
    assert len(title) < 120
    assert title.startswith("study 1.2.840")
    assert "..." in title


@pytest.mark.parametrize("shape", [(60, 50, 20, 4), (60, 50), (60, 50, 19), (50, 60, 20)])
def test_labels_of_another_shape_are_refused(shape: tuple[int, ...], tmp_path: Path) -> None:
    path = tmp_path / "wrong.nii"
    nib.save(nib.Nifti1Image(np.zeros(shape, np.uint8), np.diag([*SPACING, 1.0])), path)
    with pytest.raises(VolumeError, match=r"wrong\.nii.*shape is 60 x 50|wrong\.nii.*shape is 50 x 60"):
        write_preview(tmp_path / "out.png", nifti(water()), nib.Nifti1Image.from_filename(path))
    assert not (tmp_path / "out.png").exists()


def test_arrays_of_another_shape_are_refused() -> None:
    with pytest.raises(VolumeError, match="the labels of water"):
        draw_preview(read_volume(nifti(water()), "water"), np.zeros((1, 2, 3), np.uint8), case="water")


def test_labels_of_another_place_are_refused(tmp_path: Path) -> None:
    image = nifti(water())
    moved = image.affine.copy()
    moved[2, 3] += 12.0
    with pytest.raises(VolumeError, match=r"12\.0 mm off the CT"):
        write_preview(tmp_path / "out.png", image, nib.Nifti1Image(two_boxes(), moved))


def test_a_missing_folder_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(VolumeError, match=r"none/out\.png: cannot be written"):
        write_preview(tmp_path / "none" / "out.png", nifti(water()), nifti(two_boxes()))


def test_a_failed_write_leaves_the_old_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "out.png"
    target.write_bytes(b"old")

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(VolumeError, match="No space left"):
        write_preview(target, nifti(water()), nifti(two_boxes()))
    assert target.read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["out.png"]


def test_without_pillow_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] == "PIL":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    volume = read_volume(nifti(water()), "water")
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(FastorganError, match="Pillow"):
        draw_preview(volume, two_boxes(), case="water")


def test_each_row_shows_its_organ_in_three_planes() -> None:
    codes = np.zeros(SHAPE, np.uint8)
    # Four organs that share no slice in any direction.
    for number, organ in enumerate(ORGANS):
        codes[
            5 + 14 * number : 15 + 14 * number, 4 + 11 * number : 12 + 11 * number, 1 + 5 * number : 4 + 5 * number
        ] = organ.code
    picture = drawn(codes)
    for row, organ in enumerate(ORGANS):
        for plane in range(3):
            pixels = panel(picture, 3 * row + plane)
            shown = [other.name for other in ORGANS if (pixels == other.colour).all(axis=2).any()]
            assert shown == [organ.name]


def test_an_organ_without_a_voxel_lends_its_row_to_the_others() -> None:
    codes = two_boxes()
    codes[:, :, 9:11] = np.where(codes[:, :, 8:9] > 0, codes[:, :, 8:9], 0)
    picture = drawn(codes)
    for plane in range(3):
        pixels = panel(picture, 3 * 3 + plane)  # the pancreas' row
        assert any((pixels == organ.colour).all(axis=2).any() for organ in (LIVER, SPLEEN))
