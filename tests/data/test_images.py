import numpy as np
import pytest
from PIL import Image

from distill.data.images import UnreadableImageError, read_image, read_size

AS_STORED = {  # what a camera does to an upright image before it writes this EXIF orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def save(path, image, **options):
    image.save(path, **options)
    return path


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGB", "RGBA", "1"])
def test_modes_are_read_as_rgb(tmp_path, mode):
    values = [0, 255, 255] if mode == "1" else [0, 128, 255]
    image = Image.fromarray(np.array([values], dtype=np.uint8)).convert(mode)
    pixels = read_image(save(tmp_path / "a.png", image))
    assert pixels.dtype == np.uint8
    assert pixels.tolist() == [[[value] * 3 for value in values]]


def test_sixteen_bits_are_cut_to_eight(tmp_path):
    pixels = read_image(save(tmp_path / "a.png", Image.fromarray(np.array([[0, 0x8000, 0xFFFF]], dtype=np.uint16))))
    assert pixels.tolist() == [[[0] * 3, [128] * 3, [255] * 3]]


def test_cmyk_is_read_as_rgb(tmp_path):
    image = Image.new("RGB", (8, 8), (250, 10, 10)).convert("CMYK")
    pixels = read_image(save(tmp_path / "a.jpg", image, quality=95))
    assert np.abs(pixels.astype(int) - [250, 10, 10]).max() <= 6


def test_floating_point_is_refused(tmp_path):
    path = save(tmp_path / "a.tif", Image.fromarray(np.ones((2, 2), dtype=np.float32)))
    with pytest.raises(UnreadableImageError, match="floating-point pixels"):
        read_image(path)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_photographs_are_turned_upright(tmp_path, orientation, suffix):
    upright = np.zeros((16, 32, 3), dtype=np.uint8)
    upright[:8, :16] = 255  # the top left quarter is white
    stored = Image.fromarray(upright)
    if orientation > 1:
        stored = stored.transpose(AS_STORED[orientation])
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(tmp_path / f"a.{suffix}", stored, exif=exif)
    assert read_size(path) == (16, 32)
    pixels = read_image(path)
    assert pixels.shape == (16, 32, 3)
    assert (pixels[:8, :16] > 200).all()
    assert (pixels[8:, 16:] < 50).all()


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_cut_short(tmp_path, write_image, cut_short, suffix):
    path = write_image(tmp_path / f"a.{suffix}")
    assert read_size(path) == (48, 64)
    cut_short(path)
    for read in (read_size, read_image):
        with pytest.raises(UnreadableImageError, match=rf"a\.{suffix}: cannot be read as an image"):
            read(path)


def test_data_after_the_end_marker_is_no_fault(tmp_path, write_image):
    path = write_image(tmp_path / "a.jpg")
    path.write_bytes(path.read_bytes() + bytes(5000))
    assert read_size(path) == (48, 64)


def test_intact_images_are_not_decoded_for_their_size(tmp_path, write_image, monkeypatch):
    paths = [write_image(tmp_path / "a.jpg"), write_image(tmp_path / "a.png")]

    def refuse(*arguments):
        raise AssertionError("decoded")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", refuse)
    assert [read_size(path) for path in paths] == [(48, 64), (48, 64)]


def test_no_image(tmp_path):
    (tmp_path / "a.jpg").write_text("hello")
    for read in (read_size, read_image):
        with pytest.raises(UnreadableImageError, match=r"a\.jpg: cannot be read as an image"):
            read(tmp_path / "a.jpg")
        with pytest.raises(UnreadableImageError, match=r"b\.jpg: the image does not exist"):
            read(tmp_path / "b.jpg")
