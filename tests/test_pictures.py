"""Pictures as people have them, read as people see them; and broken ones."""

import io
import os
import random
import zlib

import numpy as np
import pytest
import skimage.data
import tifffile
from conftest import CARD, GOLDEN, QUICK, TINY, assert_one_line, encoded, mutated, run_cli
from PIL import Image, ImageCms, ImageFilter

import cnn_vis


def read(data, tmp_path, name="in.png", background="white"):
    (tmp_path / name).write_bytes(data)
    return cnn_vis.read_picture(str(tmp_path / name), background)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "1", "LA", "CMYK"])
def test_pictures_of_any_mode_are_read(mode, tmp_path):
    name = "in.tif" if mode == "CMYK" else "in.png"
    Image.open(GOLDEN / "input.png").convert("RGB").convert(mode).save(tmp_path / name)
    done = run_cli(*QUICK, f"--image={name}", "--iter_behavior=none", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert Image.open(tmp_path / "out.png").size == Image.open(GOLDEN / "input.png").size


def test_exif_orientation_is_respected(tmp_path):
    image = Image.open(GOLDEN / "input.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    image.save(tmp_path / "in.jpg", exif=exif)
    assert run_cli(*QUICK, "--image=in.jpg", "--iter_behavior=none", cwd=tmp_path).returncode == 0
    assert Image.open(tmp_path / "out.png").size == image.size[::-1]


def test_damaged_exif_is_no_hindrance(tmp_path):
    CARD.save(tmp_path / "in.png", exif=b"garbage")
    assert np.array_equal(cnn_vis.read_picture(str(tmp_path / "in.png"))[0], np.asarray(CARD))


def test_the_background_shows_where_a_picture_is_transparent(tmp_path):
    picture = CARD.convert("RGBA")
    picture.putalpha(Image.fromarray(np.repeat(np.uint8([0, 255]), 100)[None].repeat(160, 0)))
    for mode in ("RGBA", "PA"):
        data = encoded(picture if mode == "RGBA" else picture.quantize(256), "PNG")
        seen, _ = read(data, tmp_path, background="#ff8000")
        assert (seen[:, :100] == (255, 128, 0)).all()
        assert np.abs(seen[:, 100:].astype(int) - np.asarray(CARD)[:, 100:]).mean() < (
            1 if mode == "RGBA" else 20
        )
    grey = CARD.convert("L").convert("LA")
    grey.putalpha(0)
    assert (read(encoded(grey, "PNG"), tmp_path, background="black")[0] == 0).all()


def test_deeper_pictures_keep_their_range(tmp_path):
    ramp = np.arange(160 * 200, dtype=np.uint16).reshape(160, 200) * 2
    for form, name in (("PNG", "in.png"), ("TIFF", "in.tif")):
        seen, _ = read(encoded(Image.fromarray(ramp), form), tmp_path, name)
        assert np.abs(seen[:, :, 1] - ramp / 257).max() <= 0.5
    dark = np.full((40, 40), 200, np.uint16)  # nearly black, and not to be stretched
    assert (read(encoded(Image.fromarray(dark), "PNG"), tmp_path)[0] == 1).all()
    for scale in (1.0, 255.0, 3000.0):
        fractions = np.linspace(0, scale, 160 * 200, dtype=np.float32).reshape(160, 200)
        seen, _ = read(encoded(Image.fromarray(fractions), "TIFF"), tmp_path, "in.tif")
        assert seen.min() == 0
        assert seen.max() == (255 if scale != 3000 else 12)
    assert (
        read(
            encoded(Image.fromarray(np.full((9, 9), np.nan, np.float32)), "TIFF"),
            tmp_path,
            "in.tif",
        )[0].max()
        == 0
    )


# Linear light with the primaries of sRGB, from GIMP; "sRGB" is in its name.
LINEAR = (GOLDEN.parent / "linear_srgb.icc").read_bytes()
SMOOTH = CARD.filter(ImageFilter.GaussianBlur(4))


def srgb_to_linear(values):
    values = np.asarray(values) / 255
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def assert_looks_like(seen, expected, tolerance=2.5):
    expected = np.asarray(expected.convert("RGB")).astype(int)
    assert np.abs(seen.astype(int) - expected).mean() <= tolerance


def test_a_profiles_name_says_nothing(tmp_path):
    """Only a profile's curves and primaries count, for grey and transparent pictures too."""
    linear = Image.fromarray((255 * srgb_to_linear(SMOOTH) + 0.5).astype(np.uint8))
    assert "sRGB" in ImageCms.getProfileDescription(ImageCms.ImageCmsProfile(io.BytesIO(LINEAR)))
    assert_looks_like(read(encoded(linear, "PNG", icc_profile=LINEAR), tmp_path)[0], SMOOTH)
    clear = linear.convert("RGBA")
    clear.putalpha(Image.fromarray(np.repeat(np.uint8([0, 255]), 100)[None].repeat(160, 0)))
    seen, remarks = read(encoded(clear, "PNG", icc_profile=LINEAR), tmp_path, background="red")
    assert remarks == []
    assert (seen[:, :100] == (255, 0, 0)).all()
    assert_looks_like(seen[:, 100:], SMOOTH.crop((100, 0, 200, 160)))


def chunk(name, data, checksum=None):
    """A chunk of a PNG."""
    checksum = zlib.crc32(name + data) if checksum is None else checksum
    return len(data).to_bytes(4, "big") + name + data + checksum.to_bytes(4, "big")


def with_chunks(picture, *chunks):
    """The bytes of a PNG with more chunks after its header."""
    data = encoded(picture, "PNG")
    return data[:33] + b"".join(chunks) + data[33:]


def test_gamma_and_chromaticities_of_a_png_count(tmp_path):
    """Without a profile or sRGB chunk."""
    linear = Image.fromarray((255 * srgb_to_linear(SMOOTH) + 0.5).astype(np.uint8))
    gamma = chunk(b"gAMA", (100000).to_bytes(4, "big"))
    assert_looks_like(read(with_chunks(linear, gamma), tmp_path)[0], SMOOTH)
    assert np.array_equal(read(with_chunks(CARD, gamma, chunk(b"sRGB", b"\0")), tmp_path)[0], CARD)
    usual = chunk(b"gAMA", (45455).to_bytes(4, "big"))
    assert np.array_equal(read(with_chunks(CARD, usual), tmp_path)[0], CARD)
    white_first = (31270, 32900, 60000, 30000, 30000, 60000, 15000, 6000)  # red and green swapped
    swapped = (*white_first[:2], 30000, 60000, 64000, 33000, *white_first[6:])
    primaries = chunk(b"cHRM", b"".join(value.to_bytes(4, "big") for value in swapped))
    seen, remarks = read(with_chunks(SMOOTH, usual, primaries), tmp_path)
    assert remarks == []
    red, green, blue = SMOOTH.split()
    assert_looks_like(seen, Image.merge("RGB", (green, red, blue)), 4)
    nonsense = chunk(b"cHRM", bytes(32))
    seen, remarks = read(with_chunks(CARD, usual, nonsense), tmp_path)
    assert np.array_equal(seen, CARD)
    assert "ignored" in remarks[0]


def test_damaged_chunks_that_are_not_needed_are_skipped(tmp_path):
    profile = b"a profile\0\0" + zlib.compress(LINEAR)
    seen, _ = read(with_chunks(CARD, chunk(b"iCCP", profile, checksum=1)), tmp_path)
    assert np.array_equal(seen, CARD)
    long = zlib.compress(bytes(3 << 20))
    seen, _ = read(with_chunks(CARD, chunk(b"zTXt", b"a text\0\0" + long)), tmp_path)
    assert np.array_equal(seen, CARD)


RAMP = np.tile(np.arange(256), (32, 1))
DEEP = {
    "fractions that overshoot": (RAMP / 255 * 1.0000002, {}, RAMP),
    "12 bits in 16": ((RAMP * 4095 / 255).astype(np.uint16), {}, RAMP),
    "white is zero": ((RAMP * 257).astype(np.uint16), {"photometric": "miniswhite"}, 255 - RAMP),
    "heights below zero": ((RAMP * 20 - 400).astype(np.int16), {}, RAMP),
    "integers of 32 bits": ((RAMP * 100000).astype(np.int32), {}, RAMP),
}


@pytest.mark.parametrize("kind", DEEP)
def test_deep_grey_tiffs_have_the_range_that_is_told(kind, tmp_path):
    values, options, expected = DEEP[kind]
    values = values.astype(np.float32) if values.dtype == np.float64 else values
    tifffile.imwrite(tmp_path / "in.tif", values, **{"photometric": "minisblack"} | options)
    seen, remarks = cnn_vis.read_picture(str(tmp_path / "in.tif"))
    assert np.abs(seen[:, :, 0].astype(int) - expected).max() <= 1
    is_guess = kind in ("12 bits in 16", "heights below zero", "integers of 32 bits")
    assert [("taken as" in remark) for remark in remarks] == [True] * is_guess


COLOURS = np.asarray(CARD).astype(np.uint16) * 257
ALPHA = np.tile(np.linspace(0, 65535, 200).astype(np.uint16), (160, 1))
CMYK = np.asarray(CARD.convert("CMYK")).astype(np.uint16) * 257


@pytest.mark.parametrize("planar", ["contig", "separate"])
@pytest.mark.parametrize("kind", ["RGB", "RGBA", "float RGB", "LA", "CMYK", "CMYK and alpha"])
def test_deep_tiffs_of_several_channels_are_read(kind, planar, tmp_path):
    """Which Pillow reads wrongly, or not at all."""
    values, expected, options = COLOURS, np.asarray(CARD), {"photometric": "rgb"}
    if kind == "float RGB":
        values = (COLOURS / 65535).astype(np.float32)
    if kind == "LA":
        values, options = COLOURS[..., :1], {"photometric": "minisblack"}
        expected = expected[..., :1].repeat(3, axis=-1)
    if kind.startswith("CMYK"):
        values, options = CMYK, {"photometric": "separated"}
        expected = np.asarray(CARD.convert("CMYK").convert("RGB"))
    if kind in ("RGBA", "LA", "CMYK and alpha"):
        values, options["extrasamples"] = np.dstack([values, ALPHA]), ["unassalpha"]
        share = ALPHA[..., None] / 65535
        expected = expected * share + 255 * (1 - share)
    values = np.moveaxis(values, -1, 0) if planar == "separate" else values
    tifffile.imwrite(tmp_path / "in.tif", values, planarconfig=planar, **options)
    seen, remarks = cnn_vis.read_picture(str(tmp_path / "in.tif"))
    assert remarks == []
    assert np.abs(seen - expected).max() <= 2


def test_grey_levels_that_are_transparent_count_at_16_bits(tmp_path):
    values = np.full((40, 40), 30000, np.uint16)
    values[:, :20] = 1000
    data = with_chunks(Image.fromarray(values), chunk(b"tRNS", (1000).to_bytes(2, "big")))
    seen, _ = read(data, tmp_path, background="lime")
    assert (seen[:, :20] == (0, 255, 0)).all()
    assert (seen[:, 20:] == 117).all()


def test_heic_pictures_are_read_if_pillow_heif_is_there(tmp_path):
    pillow_heif = pytest.importorskip("pillow_heif", reason="pillow-heif is not installed")
    pillow_heif.register_heif_opener()
    assert_looks_like(read(encoded(SMOOTH, "HEIF", quality=95), tmp_path, "in.heic")[0], SMOOTH, 4)


def test_colour_profiles_are_applied_and_broken_ones_are_reported(tmp_path):
    """A profile is heeded: the values of a profile other than sRGB change, those of sRGB don't. A
    broken one is told."""
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert np.array_equal(
        read(encoded(CARD, "PNG", icc_profile=srgb), tmp_path)[0], np.asarray(CARD)
    )
    for profile in (b"nonsense" * 40, lab):
        seen, remarks = read(encoded(CARD, "PNG", icc_profile=profile), tmp_path)
        assert np.array_equal(seen, np.asarray(CARD))
        assert "profile" in remarks[0]


def test_the_first_frame_is_used_and_said_so(tmp_path):
    """An animation's first frame is used, and a note says so."""
    others = [CARD.rotate(90), CARD.rotate(180)]
    for form in ("GIF", "WEBP", "PNG"):
        data = encoded(CARD, form, save_all=True, append_images=others)
        seen, remarks = read(data, tmp_path, f"in.{form.lower()}")
        assert "first of 3 frames" in remarks[0]
        assert np.abs(seen.astype(int) - np.asarray(CARD)).mean() < 20


def test_very_wide_pictures_are_read(tmp_path):
    """A picture 30,000 pixels wide is read. Whether a size fits in memory is a separate check, made
    before any is allocated."""
    seen, _ = read(encoded(Image.new("RGB", (30000, 40)), "PNG"), tmp_path)
    assert seen.shape == (40, 30000, 3)
    done = run_cli(
        *TINY,
        "--image=in.png",
        "--layer=inception_a/output",
        "--initial_size=30000x300000",
        cwd=tmp_path,
    )
    assert_one_line(done, 2, "--initial_size", "30000x300000", "GB")


def bomb(width, height):
    """A PNG of few bytes that claims to be of many pixels."""
    data = bytearray(encoded(Image.new("L", (1, 1)), "PNG"))
    data[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    import zlib

    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


BROKEN = {
    "empty.png": b"",
    "text.jpg": b"not a picture at all",
    "truncated.png": encoded(CARD, "PNG")[:2000],
    "truncated.jpg": encoded(CARD, "JPEG")[:2000],
    "truncated.webp": encoded(CARD, "WEBP")[:500],
    "header.png": encoded(CARD, "PNG")[:8],
    "bomb.png": bomb(60000, 60000),
    "bomb2.png": bomb(2**31 - 1, 2**31 - 1),
    "large.png": bomb(14000, 14000),
    "photo.heic": b"\x00\x00\x00\x18ftypheic\x00\x00\x00\x00mif1heic" + bytes(100),
    "page.svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    "archive.gif": b"GIF89a" + bytes(20),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_pictures_are_one_line(name, tmp_path):
    (tmp_path / name).write_bytes(BROKEN[name])
    done = run_cli(*TINY, f"--image={name}", cwd=tmp_path)
    assert_one_line(done, 2, "--image", name, "JPEG" if name.endswith("heic") else "; ")
    assert os.listdir(tmp_path) == [name]


@pytest.mark.parametrize("form", ["PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP"])
def test_damaged_pictures_are_read_or_refused_in_one_line(form, tmp_path):
    """Random bytes changed: read, or refused in one line."""
    data, randomly = encoded(CARD, form), random.Random(form)
    for _ in range(150):
        try:
            seen, _ = read(mutated(data, randomly), tmp_path)
            assert seen.dtype == np.uint8
            assert seen.shape[2] == 3
        except cnn_vis.BadRequest as error:
            assert len(str(error).splitlines()) == 1


def raw_file(path, magic=None, orientation=1, has_preview=True):
    """Writes a raw file as cameras do: a thumbnail first and, in its sub-IFDs, the sensor's data
    and a JPEG of full size; returns the JPEG's pixels."""
    large = Image.fromarray(skimage.data.coffee())
    jpeg, place = encoded(large, "JPEG", quality=95), 0x0DEADBEE
    with tifffile.TiffWriter(path) as file:
        tags = [(274, 3, 1, orientation, True)]
        thumbnail = np.asarray(large.resize((60, 40)))
        below = 1 + has_preview
        file.write(thumbnail, photometric="rgb", subfiletype=1, subifds=below, extratags=tags)
        pattern = [(33421, 3, 2, (2, 2), True), (33422, 1, 4, b"\0\1\1\2", True)]
        file.write(np.zeros((400, 600), np.uint16), photometric="CFA", extratags=pattern)
        if has_preview:
            tags = [(513, 4, 1, place, True), (514, 4, 1, len(jpeg), True)]
            file.write(np.zeros((2, 2), np.uint8), photometric="minisblack", extratags=tags)
    data = path.read_bytes()
    data = data.replace(place.to_bytes(4, "little"), len(data).to_bytes(4, "little")) + jpeg
    path.write_bytes((magic or data[:4]) + data[4:])
    return np.asarray(Image.open(io.BytesIO(jpeg)))


@pytest.mark.parametrize("magic", [None, b"IIRO", b"IIU\0"], ids=["DNG", "Olympus", "Panasonic"])
@pytest.mark.parametrize("orientation", [1, 6])
def test_the_largest_picture_in_a_camera_raw_is_taken(magic, orientation, tmp_path):
    expected = raw_file(tmp_path / "in.dng", magic, orientation)
    picture, remarks = cnn_vis.read_picture(str(tmp_path / "in.dng"))
    expected = np.rot90(expected, -1) if orientation == 6 else expected
    assert np.array_equal(picture, expected)
    (remark,) = remarks
    assert "camera raw" in remark
    assert "400x600" in remark


def test_a_camera_raw_with_a_thumbnail_alone_is_told(tmp_path):
    raw_file(tmp_path / "in.dng", has_preview=False)
    picture, (remark,) = cnn_vis.read_picture(str(tmp_path / "in.dng"))
    assert picture.shape == (40, 60, 3)
    assert "camera raw; the largest picture in it, 40x60, is used" in remark


def test_damaged_pixels_are_not_shown(tmp_path):
    """A PNG with a wrong byte among its pixels, which decoders notice, is refused."""
    data = encoded(CARD, "PNG")
    place = data.index(b"IDAT") + 200
    broken = data[:place] + bytes([data[place] ^ 255]) + data[place + 1 :]
    with pytest.raises(cnn_vis.BadRequest, match="cannot be read as a picture"):
        read(broken, tmp_path)


RAMP = np.linspace(0, 1, 200).reshape(10, 20)
NUMBERS = {  # an array as a TIFF: grey levels that people see; whether the range is a guess
    "float mask": ((RAMP > 0.5).astype(np.float32), (RAMP > 0.5) * 255, False),
    "float mask, RGB": (
        np.repeat((RAMP > 0.5).astype(np.float32)[..., None], 3, 2),
        (RAMP > 0.5) * 255,
        False,
    ),
    "float, opaque": (
        np.dstack([RAMP, RAMP, RAMP, RAMP * 0 + 1]).astype(np.float32),
        RAMP * 255,
        False,
    ),
    "float, half transparent": (
        np.dstack([RAMP, RAMP, RAMP, RAMP * 0 + 0.5]).astype(np.float32),
        127.5 + RAMP * 127.5,
        False,
    ),
    "light up to 4": (4 * RAMP.astype(np.float32), RAMP * 255, True),
    "float16": (RAMP.astype(np.float16), RAMP * 255, False),
    "uint32": ((RAMP * (2**32 - 1)).astype(np.uint32), RAMP * 255, True),
    "int8": ((RAMP * 255 - 128).astype(np.int8), RAMP * 255, True),
    "int16 without negative ones": ((RAMP * 32767).astype(np.int16), RAMP * 255, True),
}


@pytest.mark.parametrize("kind", NUMBERS)
def test_tiffs_of_other_numbers_are_seen_as_they_are(kind, tmp_path):
    values, expected, is_guess = NUMBERS[kind]
    colours = {"photometric": "rgb" if values.ndim == 3 else "minisblack"}
    if values.ndim == 3 and values.shape[2] == 4:
        colours["extrasamples"] = ["unassalpha"]
    tifffile.imwrite(tmp_path / "in.tif", values, **colours)
    picture, remarks = cnn_vis.read_picture(str(tmp_path / "in.tif"))
    assert picture == pytest.approx(np.repeat(expected[..., None], 3, 2), abs=2)
    assert bool(remarks) == is_guess
