"""Pictures as people have them, read as people see them; and broken ones."""

import importlib.util
import io
import os
import random
import struct
import sys
import zlib

import numpy as np
import pytest
import skimage.data
import tifffile
from conftest import CARD, GOLDEN, QUICK, TINY, assert_one_line, encoded, mutated, run_cli
from PIL import Image, ImageCms, ImageFilter

import cnn_vis
from cnn_vis_lib.formats import PNG
from cnn_vis_lib.reading import read_picture


def read(data, tmp_path, name="in.png", background="white"):
    (tmp_path / name).write_bytes(data)
    return read_picture(str(tmp_path / name), background)


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
    assert np.array_equal(read_picture(str(tmp_path / "in.png"))[0], np.asarray(CARD))


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
    grey.putalpha(Image.fromarray(np.repeat(np.uint8([0, 255]), 100)[None].repeat(160, 0)))
    seen, _ = read(encoded(grey, "PNG"), tmp_path, background="black")
    assert (seen[:, :100] == 0).all()
    assert (seen[:, 100:, 0] == np.asarray(CARD.convert("L"))[:, 100:]).all()


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_a_picture_that_is_transparent_everywhere_is_shown(mode, tmp_path):
    """And said so: its alpha channel is a mistake."""
    picture = CARD.convert("L" if mode == "LA" else "RGB")
    clear = picture.convert(mode)
    clear.putalpha(0)
    seen, (remark,) = read(encoded(clear, "PNG"), tmp_path)
    assert np.array_equal(seen, picture.convert("RGB"))
    assert "transparent everywhere" in remark


def test_deeper_pictures_keep_their_range(tmp_path):
    ramp = np.arange(160 * 200, dtype=np.uint16).reshape(160, 200) * 2
    for form, name in (("PNG", "in.png"), ("TIFF", "in.tif")):
        seen, _ = read(encoded(Image.fromarray(ramp), form), tmp_path, name)
        assert np.abs(seen[:, :, 1] - ramp / 257).max() <= 0.5
    dark = np.full((40, 40), 200, np.uint16)  # nearly black, and not to be stretched
    seen, (remark,) = read(encoded(Image.fromarray(dark), "PNG"), tmp_path)
    assert (seen == 1).all()
    assert "very dark: its values reach only 200 of 65535" in remark
    for scale in (1.0, 255.0, 3000.0, 40000.0):
        fractions = np.linspace(0, scale, 160 * 200, dtype=np.float32).reshape(160, 200)
        seen, remarks = read(encoded(Image.fromarray(fractions), "TIFF"), tmp_path, "in.tif")
        assert seen.min() == 0
        assert seen.max() == (255 if scale != 40000 else 156)  # of 65535
        assert ["0 (black) to 3000 (white)" in r for r in remarks] == [True] * (scale == 3000)
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
    film = chunk(b"gAMA", (50994).to_bytes(4, "big"))  # ffmpeg's
    assert np.array_equal(read(with_chunks(CARD, film), tmp_path)[0], CARD)
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
    seen, remarks = read_picture(str(tmp_path / "in.tif"))
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
    seen, remarks = read_picture(str(tmp_path / "in.tif"))
    assert remarks == []
    assert np.abs(seen - expected).max() <= 2


def test_grey_levels_that_are_transparent_count_at_16_bits(tmp_path):
    values = np.full((40, 40), 30000, np.uint16)
    values[:, :20] = 1000
    data = with_chunks(Image.fromarray(values), chunk(b"tRNS", (1000).to_bytes(2, "big")))
    seen, _ = read(data, tmp_path, background="lime")
    assert (seen[:, :20] == (0, 255, 0)).all()
    assert (seen[:, 20:] == 117).all()


@pytest.mark.parametrize("name", ["in.heic", "in.jpg", "in.PNG", "in.HIF", "in"])
def test_heic_pictures_are_read_if_pillow_heif_is_there(name, tmp_path):
    """Whatever they are called."""
    pillow_heif = pytest.importorskip("pillow_heif", reason="pillow-heif is not installed")
    pillow_heif.register_heif_opener()
    data = encoded(SMOOTH, "HEIF", quality=95)
    assert_looks_like(read(data, tmp_path, name)[0], SMOOTH, 4)
    with pytest.raises(cnn_vis.BadRequest) as raised:
        read(data[: len(data) // 2], tmp_path, name)
    assert "pip install" not in str(raised.value)


@pytest.mark.parametrize("form", ["HEIC", "JPEG XL"])
def test_a_format_that_takes_a_package_is_told(form, tmp_path, monkeypatch):
    """Which one, if it is not installed; by content."""
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name: None if name.startswith("pillow_") else found(name),
    )
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    monkeypatch.setattr(Image, "OPEN", {k: v for k, v in Image.OPEN.items() if k != "HEIF"})
    data = {"HEIC": BROKEN["photo.heic"], "JPEG XL": b"\xff\x0a" + bytes(100)}[form]
    package = {"HEIC": "pillow-heif", "JPEG XL": "pillow-jxl-plugin"}[form]
    with pytest.raises(cnn_vis.BadRequest, match=f"it may be {form}.*pip install {package}"):
        read(data, tmp_path, "in.jpg")


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
    picture, remarks = read_picture(str(tmp_path / "in.dng"))
    expected = np.rot90(expected, -1) if orientation == 6 else expected
    assert np.array_equal(picture, expected)
    (remark,) = remarks
    assert "camera raw" in remark
    assert "400x600" in remark


def test_a_camera_raw_with_a_thumbnail_alone_is_told(tmp_path):
    raw_file(tmp_path / "in.dng", has_preview=False)
    picture, (remark,) = read_picture(str(tmp_path / "in.dng"))
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
    picture, remarks = read_picture(str(tmp_path / "in.tif"))
    assert picture == pytest.approx(np.repeat(expected[..., None], 3, 2), abs=2)
    assert bool(remarks) == is_guess


# ---- Declared colours ----------------------------------------------------------------------------

PRIMARIES = {  # number in H.273: red, green, blue; white is D65
    1: ((0.64, 0.33), (0.3, 0.6), (0.15, 0.06)),
    9: ((0.708, 0.292), (0.17, 0.797), (0.131, 0.046)),
    12: ((0.68, 0.32), (0.265, 0.69), (0.15, 0.06)),
    "Adobe RGB": ((0.64, 0.33), (0.21, 0.71), (0.15, 0.06)),
}


def linear_to_srgb(linear):
    linear = np.clip(linear, 0, 1)
    low = linear <= 0.0031308
    return 255 * np.where(low, linear * 12.92, 1.055 * linear ** (1 / 2.4) - 0.055)


def xyz_of(primaries):
    columns = np.array([[x / y, 1, (1 - x - y) / y] for x, y in PRIMARIES[primaries]]).T
    return columns * np.linalg.solve(columns, [0.3127 / 0.329, 1, (1 - 0.3127 - 0.329) / 0.329])


def as_srgb(linear, primaries):
    """Linear light (H, W, 3) with these primaries as people see it, 0..255."""
    return linear_to_srgb(linear @ np.linalg.solve(xyz_of(1), xyz_of(primaries)).T)


def deep_png(values, *chunks, colour=2):
    """The bytes of a PNG of 16 bits: uint16 (H, W, C)."""
    height, width = values.shape[:2]
    header = struct.pack(">IIBBBBB", width, height, 16, colour, 0, 0, 0)
    rows = values.astype(">u2").tobytes()
    length = len(rows) // height
    lines = b"".join(b"\0" + rows[i : i + length] for i in range(0, len(rows), length))
    pixels = chunk(b"IDAT", zlib.compress(lines))
    return PNG + chunk(b"IHDR", header) + b"".join(chunks) + pixels + chunk(b"IEND", b"")


def cicp(*numbers):
    return chunk(b"cICP", bytes(numbers))


@pytest.mark.parametrize("depth", [8, 16])
@pytest.mark.parametrize("primaries", [9, 12])
def test_colours_declared_by_numbers_count_in_a_png(primaries, depth, tmp_path):
    """Before a profile, and before a gamma."""
    expected = as_srgb(srgb_to_linear(SMOOTH), primaries)
    wrong = [
        chunk(b"iCCP", b"x\0\0" + zlib.compress(LINEAR)),
        chunk(b"gAMA", struct.pack(">I", 10**5)),
    ]
    for others in ([], *([other] for other in wrong)):
        chunks = (cicp(primaries, 13, 0, 1), *others)
        deep = deep_png(np.asarray(SMOOTH).astype(np.uint16) * 257, *chunks)
        seen, remarks = read(deep if depth == 16 else with_chunks(SMOOTH, *chunks), tmp_path)
        assert np.abs(seen - expected).mean() < 0.6
        assert remarks == []


def test_numbers_that_mean_srgb_change_nothing(tmp_path):
    """As those of films do, whose curve is meant for dim rooms. A range that leaves out the ends is
    stretched; numbers that say nothing leave it to others; unknown ones are told."""
    gamma = chunk(b"gAMA", (100000).to_bytes(4, "big"))
    for numbers in ((1, 13, 0, 1), (1, 1, 0, 1), (1, 6, 0, 1), (2, 13, 0, 1)):
        assert np.array_equal(read(with_chunks(CARD, cicp(*numbers), gamma), tmp_path)[0], CARD)
    narrow = Image.fromarray((16 + np.asarray(CARD) * (219 / 255)).round().astype(np.uint8))
    assert_looks_like(read(with_chunks(narrow, cicp(1, 13, 0, 0)), tmp_path)[0], CARD, 0.6)
    linear = Image.fromarray((255 * srgb_to_linear(SMOOTH) + 0.5).astype(np.uint8))
    assert_looks_like(read(with_chunks(linear, cicp(2, 2, 0, 1), gamma), tmp_path)[0], SMOOTH)
    seen, (remark,) = read(with_chunks(CARD, cicp(200, 13, 0, 1)), tmp_path)
    assert np.array_equal(seen, CARD)
    assert "colour declaration is ignored (primaries 200" in remark


@pytest.mark.parametrize(("curve", "number"), [("PQ", 16), ("HLG", 18)])
def test_hdr_is_told_and_fits(curve, number, tmp_path):
    """Grey levels keep their order, paper white (58 % of PQ, 75 % of HLG) is bright but not white,
    and black is black."""
    levels = np.repeat(np.linspace(0, 65535, 300).astype(np.uint16)[None, :, None], 40, 0)
    data = deep_png(levels.repeat(3, 2), cicp(9, number, 0, 1))
    seen, (remark,) = read(data, tmp_path)
    assert f"HDR ({curve})" in remark
    grey = seen[0, :, 1].astype(int)
    assert (np.diff(grey) >= 0).all()
    assert grey[0] == 0
    assert grey[-1] >= 253
    assert 215 < grey[round(300 * {"PQ": 0.58, "HLG": 0.75}[curve])] < 245
    assert np.abs(seen.astype(int) - seen[..., :1]).max() <= 1


@pytest.mark.parametrize("form", ["AVIF", "HEIF"])
@pytest.mark.parametrize("primaries", [9, 12])
def test_colours_declared_by_numbers_count_in_avif_and_heic(form, primaries, tmp_path):
    """But not before a profile."""
    numbers = {"color_primaries": primaries, "transfer_characteristics": 13}
    options = {"quality": 95, "chroma": 444, "matrix_coefficients": 6} | numbers
    if form == "HEIF":
        pytest.importorskip("pillow_heif").register_heif_opener()
    else:
        options = {"quality": 100, "subsampling": "4:4:4"}
    data = bytearray(encoded(SMOOTH, form, **options))
    place = data.find(b"nclx")
    data[place + 4 : place + 8] = struct.pack(">HH", primaries, 13)
    seen, remarks = read(bytes(data), tmp_path, "in.jpg")
    assert np.abs(seen - as_srgb(srgb_to_linear(SMOOTH), primaries)).mean() < 2
    assert remarks == []


def test_adobe_rgb_that_only_exif_declares(tmp_path):
    """As cameras do; a profile comes first."""
    pixels = np.asarray(SMOOTH)
    expected = as_srgb((pixels / 255) ** (563 / 256), "Adobe RGB")
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for space, index, profile in ((0xFFFF, "R03", None), (2, None, None), (0xFFFF, "R03", srgb)):
        exif = Image.Exif()
        exif.get_ifd(0x8769)[0xA001] = space
        if index:
            exif.get_ifd(0x8769)[0xA005] = {1: index, 2: b"0100"}
        options = {"exif": exif, "quality": 100, "subsampling": 0}
        seen, remarks = read(encoded(SMOOTH, "JPEG", icc_profile=profile, **options), tmp_path)
        assert np.abs(seen.astype(float) - (pixels if profile else expected)).mean() < 1.5
        assert remarks == []


def bmp_5(picture, profile):
    """The bytes of a BMP with the fifth version of the header."""
    rows = np.asarray(picture)[::-1, :, ::-1]
    assert not rows.shape[1] % 4
    form = struct.pack("<IiiHHIIiiII", 124, picture.width, picture.height, 1, 24, *[0] * 6)
    form += (
        bytes(16) + b"DEBM" + bytes(48) + struct.pack("<IIII", 4, 124 + rows.size, len(profile), 0)
    )
    start = struct.pack("<2sIHHI", b"BM", 14 + 124 + rows.size + len(profile), 0, 0, 138)
    return start + form + rows.tobytes() + profile


def jp2_with(picture, profile):
    """The bytes of a JPEG 2000 with a profile."""
    data = encoded(picture, "JPEG2000")
    place = data.index(b"colr")
    length = int.from_bytes(data[place - 4 : place], "big")
    box = struct.pack(">I", 11 + len(profile)) + b"colr\2\0\0" + profile
    whole = data.index(b"jp2h") - 4
    size = int.from_bytes(data[whole : whole + 4], "big") + len(box) - length
    data = data[: place - 4] + box + data[place - 4 + length :]
    return data[:whole] + struct.pack(">I", size) + data[whole + 4 :]


def psd(channels, layers=b"", resources=b""):
    """The bytes of a PSD of uint8 channels (H, W)."""
    head = b"8BPS" + struct.pack(">H6xHIIHH", 1, len(channels), *channels[0].shape, 8, 3) + bytes(4)
    parts = (struct.pack(">I", len(part)) + part for part in (resources, layers))
    return head + b"".join(parts) + bytes(2) + b"".join(c.tobytes() for c in channels)


def test_profiles_that_pillow_may_not_see_count(tmp_path):
    """In JPEG 2000, in BMP, and in PSD."""
    linear = Image.fromarray((255 * srgb_to_linear(SMOOTH) + 0.5).astype(np.uint8))
    entry = b"8BIM" + struct.pack(">HHI", 1039, 0, len(LINEAR)) + LINEAR + bytes(len(LINEAR) % 2)
    files = {
        "in.bmp": bmp_5(linear, LINEAR),
        "in.jp2": jp2_with(linear, LINEAR),
        "in.psd": psd([*np.moveaxis(np.asarray(linear), -1, 0)], resources=entry),
    }
    for name, data in files.items():
        seen, remarks = read(data, tmp_path, name)
        assert_looks_like(seen, SMOOTH)
        assert remarks == []


# ---- Depths --------------------------------------------------------------------------------------

LIGHT = srgb_to_linear(48 * np.asarray(SMOOTH) / 255)  # dark, in linear light
DARK = Image.fromarray((48 * np.asarray(SMOOTH) / 255 + 0.5).astype(np.uint8))


@pytest.mark.parametrize("grey", [False, True])
@pytest.mark.parametrize("how", ["PNG, profile", "PNG, gamma", "PNG, numbers", "TIFF, profile"])
def test_dark_linear_pictures_keep_their_depth(how, grey, tmp_path):
    """The curve is applied before the reduction to 8 bits, and brightness is not guessed."""
    light = LIGHT[..., :1] if grey else LIGHT
    values = (light * 65535).round().astype(np.uint16)
    declared = {
        "PNG, profile": chunk(b"iCCP", b"x\0\0" + zlib.compress(LINEAR)),
        "PNG, gamma": chunk(b"gAMA", (100000).to_bytes(4, "big")),
        "PNG, numbers": cicp(1, 8, 0, 1),
    }
    if how == "TIFF, profile":
        photometric = "minisblack" if grey else "rgb"
        pixels = values[..., 0] if grey else values
        tifffile.imwrite(tmp_path / "in", pixels, photometric=photometric, iccprofile=LINEAR)
        data = (tmp_path / "in").read_bytes()
    else:
        data = deep_png(values, declared[how], colour=0 if grey else 2)
    seen, remarks = read(data, tmp_path)
    assert np.abs(seen.astype(int) - np.asarray(DARK)[..., : light.shape[-1]]).max() <= 1
    assert remarks == []


def packed_12_bits(top):
    """The bytes of a grey TIFF of 12 bits, and the levels 0..255 that it shows."""
    width, height = 300, 40
    values = np.tile(np.linspace(0, top, width).round().astype(int), (height, 1))
    a, b = values[:, ::2], values[:, 1::2]
    strip = np.stack([a >> 4, (a & 15) << 4 | b >> 8, b & 255], 2).astype(np.uint8).tobytes()
    tags = {256: width, 257: height, 258: 12, 259: 1, 262: 1, 273: 8, 277: 1, 278: height}
    tags[279] = len(strip)
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    directory = struct.pack("<H", len(tags)) + entries + bytes(4)
    return b"II*\0" + struct.pack("<I", 8 + len(strip)) + strip + directory, values * (255 / 4095)


@pytest.mark.parametrize("top", [4095, 900, 100])
def test_12_bits_have_their_range_however_dark_they_are(top, tmp_path):
    data, expected = packed_12_bits(top)
    seen, remarks = read(data, tmp_path, "in.tif")
    assert np.abs(seen[..., 0] - expected).max() <= 0.6
    assert remarks == []


@pytest.mark.parametrize("bits", [10, 12, 14])
@pytest.mark.parametrize("form", ["grey PNG", "PNG", "grey TIFF", "TIFF"])
def test_fewer_bits_in_16_are_told(form, bits, tmp_path):
    """Unless the file says what is white."""
    values = (np.linspace(0, 2**bits - 1, 300)[None, :, None] * np.ones((40, 1, 3))).round()
    values = values.astype(np.uint16)[..., : 1 if "grey" in form else 3]
    expected = np.linspace(0, 255, 300)
    if "PNG" in form:
        data = deep_png(values, colour=2 if values.shape[2] == 3 else 0)
        seen, (remark,) = read(data, tmp_path)
        assert f"taken as 0 (black) to {2**bits - 1} (white)" in remark
        assert np.abs(seen[0, :, 1] - expected).max() <= 1
        return
    options = {"photometric": "rgb" if values.shape[2] == 3 else "minisblack"}
    white = [(281, "H", 1, 2**bits - 1, True)]
    for tags in ([], white, [(281, "H", 1, 65535, True)]):
        tifffile.imwrite(tmp_path / "in.tif", values.squeeze(), extratags=tags, **options)
        seen, remarks = read_picture(str(tmp_path / "in.tif"))
        is_white = tags == white or not tags
        assert np.abs(seen[0, :, 1] - expected * (1 if is_white else 2**bits / 65536)).max() <= 1
        assert ["taken as" in remark for remark in remarks] == [True] * (not tags)


@pytest.mark.parametrize("kind", ["<f4", "<f8", "<i2", "<i4"])
@pytest.mark.parametrize("nothing", ["-9999", "nan", None])
def test_heights_have_their_contrast_without_what_is_no_data(kind, nothing, tmp_path):
    """Which is transparent."""
    if nothing == "nan" and "f" not in kind:
        nothing = "-32768"
    heights = np.tile(np.linspace(100, 2900, 300), (40, 1)).astype(kind)
    tags = []
    if nothing:
        heights[:10, :20] = float(nothing)
        tags = [(42113, "s", 0, nothing, True)]
    tifffile.imwrite(tmp_path / "in.tif", heights, extratags=tags, photometric="minisblack")
    seen, (remark,) = read_picture(str(tmp_path / "in.tif"), "red")
    low, high = (0, 4095) if kind == "<i2" else (100, 2900)
    assert f"taken as {low} (black) to {high} (white)" in remark
    expected = (np.linspace(100, 2900, 300) - low) * (255 / (high - low))
    assert np.abs(seen[20, :, 1] - expected).max() <= 1
    assert (seen[5, 5] == (255, 0, 0)).all() == bool(nothing)


# ---- Channels, palettes, pages, containers -------------------------------------------------------


def test_a_channel_of_a_psd_is_opacity_only_with_layers_that_say_so(tmp_path):
    """A saved selection is not; a negative number of layers means that it is."""
    colours = [*np.moveaxis(np.asarray(CARD), -1, 0)]
    half = np.zeros(colours[0].shape, np.uint8)
    half[:, :100] = 255
    for selection in (half, half * 0):
        seen, remarks = read(psd([*colours, selection]), tmp_path, "in.psd")
        assert np.array_equal(seen, CARD)
        assert remarks == []
    layer = struct.pack(">iiiiH4s4sBBBBI", 0, 0, 0, 0, 0, b"8BIM", b"norm", 255, 0, 0, 0, 0)
    layers = struct.pack(">Ih", 2 + len(layer), -1) + layer
    seen, _ = read(psd([*colours, half], layers), tmp_path, "in.psd", "lime")
    assert (seen[:, 100:] == (0, 255, 0)).all()
    assert np.array_equal(seen[:, :100], np.asarray(CARD)[:, :100])


def test_a_colour_that_is_transparent_counts_at_16_bits(tmp_path):
    """All 16 of them, in all three channels."""
    values = COLOURS.copy()
    values[:, :50] = (1000, 2000, 3000)
    values[:, 50:100] = (1000, 2000, 3001)
    data = deep_png(values, chunk(b"tRNS", struct.pack(">HHH", 1000, 2000, 3000)))
    seen, remarks = read(data, tmp_path, background="lime")
    assert (seen[:, :50] == (0, 255, 0)).all()
    assert not (seen[:, 50:] == (0, 255, 0)).all(axis=-1).any()
    assert remarks == []


def test_palettes_of_8_bits_in_a_tiff_are_seen(tmp_path):
    """The rule is 16 bits."""
    for top in (255, 65535):
        colours = (np.random.default_rng(1).random((3, 256)) * top).astype(np.uint16)
        index = np.arange(200, dtype=np.uint8)[None].repeat(40, 0)
        tifffile.imwrite(tmp_path / "in.tif", index, photometric="palette", colormap=colours)
        seen, _ = read_picture(str(tmp_path / "in.tif"))
        expected = colours.T[:200] if top == 255 else colours.T[:200] // 256
        assert np.array_equal(seen[0], expected)


@pytest.mark.parametrize("depth", [8, 16])
def test_the_first_full_page_of_a_tiff_is_taken(depth, tmp_path):
    """Not a reduced copy before it."""
    pixels = np.asarray(CARD) if depth == 8 else COLOURS
    with tifffile.TiffWriter(tmp_path / "in.tif") as file:
        file.write(pixels[::4, ::4], photometric="rgb", subfiletype=1)
        file.write(pixels, photometric="rgb")
    seen, _ = read_picture(str(tmp_path / "in.tif"))
    assert np.array_equal(seen, CARD)


def test_a_tiff_of_reduced_colours_is_not_called_cut_short(tmp_path):
    tags = {256: 16, 257: 16, 258: 8, 259: 1, 262: 6, 273: 8, 277: 3, 278: 16, 279: 384}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    entries += struct.pack("<HHIHH", 530, 3, 2, 2, 2)
    directory = struct.pack("<H", len(tags) + 1) + entries + bytes(4)
    data = b"II*\0" + struct.pack("<I", 8 + 384) + bytes(384) + directory
    with pytest.raises(cnn_vis.BadRequest, match="YCbCr.*not supported"):
        read(data, tmp_path, "in.tif")


FITS = {  # BITPIX: (BSCALE, BZERO), the numbers meant
    "unsigned": (16, 1, 32768, np.linspace(0, 65535, 300)),
    "scaled": (16, 0.5, 100, np.linspace(-400, 600, 300)),
    "floats": (-32, 2, 0, np.linspace(0, 255, 300)),
    "plain": (8, 1, 0, np.linspace(0, 255, 300)),
}


@pytest.mark.parametrize("kind", FITS)
def test_numbers_of_a_fits_are_scaled(kind, tmp_path):
    bits, scale, zero, meant = FITS[kind]
    dtype = {8: ">u1", 16: ">i2", -32: ">f4"}[bits]
    stored = (meant - zero) / scale
    stored = (stored if bits < 0 else stored.round()).astype(dtype)
    cards = {"SIMPLE": "T", "BITPIX": bits, "NAXIS": 2, "NAXIS1": 300, "NAXIS2": 40}
    cards |= {"BSCALE": scale, "BZERO": zero} if kind != "plain" else {}
    text = "".join(f"{name:8}= {value!s:>20}".ljust(80) for name, value in cards.items())
    text += "HISTORY old BZERO = 100000".ljust(80) + "COMMENT level = -".ljust(80)
    header = (text + "END").ljust(2880).encode()
    data = header + np.tile(stored, (40, 1)).tobytes()
    seen, _ = read(data + bytes(-len(data) % 2880), tmp_path, "in.fits")
    low, high = min(0, meant.min()), meant.max()
    assert np.abs(seen[20, :, 1] - (meant - low) * (255 / (high - low))).max() <= 1


def test_statistics_of_a_tiff_do_not_count_above_its_profile(tmp_path):
    """MaxSampleValue may only say which value occurs."""
    values = (np.linspace(0, 9000, 300)[None, :, None] * np.ones((40, 1, 3))).astype(np.uint16)
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    tags = [(281, "H", 1, 9000, True)]
    tifffile.imwrite(
        tmp_path / "in.tif", values, photometric="rgb", iccprofile=profile, extratags=tags
    )
    seen, remarks = read_picture(str(tmp_path / "in.tif"))
    assert seen.max() == 35
    assert remarks == []


@pytest.mark.parametrize("top", [200, 20000, 65535])
def test_a_deep_pgm_is_as_bright_as_it_says(top, tmp_path):
    values = np.tile(np.linspace(0, top, 300).astype(">u2"), (40, 1))
    seen, remarks = read(b"P5 300 40 65535\n" + values.tobytes(), tmp_path, "in.pgm")
    assert np.abs(seen[20, :, 1] - np.linspace(0, top, 300) / 257).max() <= 1
    assert remarks == []


def test_a_tiff_whose_first_page_is_a_copy_of_one_below_it(tmp_path):
    """The full page, in a sub-IFD, is read."""
    with tifffile.TiffWriter(tmp_path / "in.tif") as file:
        file.write(np.asarray(CARD)[::4, ::4], photometric="rgb", subfiletype=1, subifds=1)
        file.write(np.asarray(CARD), photometric="rgb")
    assert np.array_equal(read_picture(str(tmp_path / "in.tif"))[0], CARD)


@pytest.mark.parametrize("depth", [8, 16])
def test_a_profile_counts_where_colours_are_premultiplied(depth, tmp_path):
    share = np.linspace(0.2, 1, 200)[None, :, None] * np.ones((160, 1, 1))
    top = 2**depth - 1
    colours = np.dstack([np.asarray(CARD) / 255 * share, share]) * top
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    tifffile.imwrite(
        tmp_path / "in.tif",
        colours.round().astype(f"u{depth // 8}"),
        photometric="rgb",
        extrasamples=["assocalpha"],
        iccprofile=srgb,
    )
    seen, remarks = read_picture(str(tmp_path / "in.tif"), "black")
    assert np.abs(seen - np.asarray(CARD) * share).max() <= (4 if depth == 8 else 1.1)
    assert remarks == []


def test_a_16_bit_png_of_grey_and_alpha_keeps_its_depth(tmp_path):
    """In linear light, and of 12 bits, which are those of its alpha channel too."""
    alpha = np.full(LIGHT.shape[:2], 65535)
    dark = np.dstack([LIGHT[..., 0] * 65535, alpha]).round().astype(np.uint16)
    gamma = chunk(b"gAMA", (100000).to_bytes(4, "big"))
    seen, remarks = read(deep_png(dark, gamma, colour=4), tmp_path)
    assert np.abs(seen[..., 0].astype(int) - np.asarray(DARK)[..., 0]).max() <= 1
    assert remarks == []
    ramp = np.tile(np.linspace(0, 4095, 300), (40, 1))
    twelve = np.dstack([ramp, np.full(ramp.shape, 4095)]).round().astype(np.uint16)
    seen, (remark,) = read(deep_png(twelve, colour=4), tmp_path, background="red")
    assert "to 4095 (white)" in remark
    assert np.abs(seen[20, :, 1] - np.linspace(0, 255, 300)).max() <= 1


def test_the_junk_in_a_tga_is_not_opacity(tmp_path):
    """Unless its header says so."""
    clear = CARD.convert("RGBA")
    clear.putalpha(Image.fromarray(np.repeat(np.uint8([0, 255]), 100)[None].repeat(160, 0)))
    data = bytearray(encoded(clear, "TGA"))
    seen, _ = read(bytes(data), tmp_path, "in.tga", "lime")
    assert (seen[:, :100] == (0, 255, 0)).all()
    data[17] &= 0xF0
    seen, _ = read(bytes(data), tmp_path, "in.tga", "lime")
    assert np.array_equal(seen, CARD)


def test_postscript_is_not_run(tmp_path):
    """It is a program, which might never end."""
    loop = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n{} loop\nshowpage"
    with pytest.raises(cnn_vis.BadRequest, match="PostScript"):
        read(loop, tmp_path, "in.png")


def test_colours_of_more_than_8_bits_in_a_jpeg_2000_are_refused(tmp_path):
    """Pillow would make their white black."""
    data = bytearray(encoded(CARD, "JPEG2000"))
    place = data.index(b"ihdr")
    data[place + 4 + 10] = 15
    with pytest.raises(cnn_vis.BadRequest, match="JPEG 2000 with colours of 16 bits"):
        read(bytes(data), tmp_path, "in.jp2")
