"""Images as a viewer shows them: modes, transparency, orientation, channels; damaged ones named."""

import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pictures import numbers, picture, save_folder
from PIL import Image

from kart import data
from kart.data import images

pytestmark = pytest.mark.usefixtures("own_cache")


def decoded(image: Image.Image, format="PNG", **options) -> tuple[np.ndarray, images.Header]:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    pixels, header = images.decode(io.BytesIO(buffer.getvalue()), "here")
    told = images.header(io.BytesIO(buffer.getvalue()), "here")
    assert pixels.size == header.size == told.size and pixels.mode == "RGB"
    assert told == header
    return np.asarray(pixels), header


def test_transparency_is_composited_on_white():
    image = Image.new("RGBA", (3, 1))
    for x, value in enumerate([(0, 0, 0, 0), (0, 0, 0, 255), (200, 100, 0, 51)]):
        image.putpixel((x, 0), value)
    pixels, header = decoded(image)
    # 0.2 of the colour, 0.8 of white
    assert pixels.tolist() == [[[255] * 3, [0] * 3, [244, 224, 204]]]
    assert header.changes == ("transparency composited on white",) and not header.grey
    grey = Image.new("LA", (1, 1), (0, 0))
    pixels, header = decoded(grey)
    assert pixels.tolist() == [[[255] * 3]] and header.grey
    # a grey that is transparent, in 8 and in 16 bits, where its neighbour looks the same
    for kind, clear, other in (("uint8", 7, 8), ("uint16", 7 * 257, 7 * 257 + 1)):
        pixels, header = decoded(
            Image.fromarray(np.array([[clear, other]], kind)), transparency=clear
        )
        assert pixels[0, :, 0].tolist() == [255, 8 if kind == "uint8" else 7]
        assert "transparency composited on white" in header.changes and header.grey
    # a palette with a transparent entry: a glyph on no ground
    palette = Image.new("P", (2, 1))
    palette.putpalette([0, 0, 0, 10, 20, 30])
    palette.putpixel((1, 0), 1)
    pixels, header = decoded(palette, transparency=0)
    assert pixels.tolist() == [[[255] * 3, [10, 20, 30]]]
    assert header.changes == ("transparency composited on white", "palette to RGB")


def test_deep_images_are_scaled_over_the_whole_range():
    values = np.array([[0, 128, 129, 257, 65535, 32768]], dtype=np.uint16)
    for format in ("PNG", "TIFF"):
        pixels, header = decoded(Image.fromarray(values), format)
        assert pixels[0, :, 0].tolist() == [0, 0, 1, 1, 255, 128]
        assert header.grey and header.changes == ("16 bits a channel scaled to 8",)
    with pytest.raises(ValueError, match="16-bit images, got here: mode I has values outside"):
        decoded(Image.fromarray(np.array([[70000]], dtype=np.int32)), "TIFF")
    with pytest.raises(ValueError, match="16-bit images, got here: mode F is neither"):
        decoded(Image.new("F", (1, 1)), "TIFF")
    # a mask of 0 and 255 in 32 bits would be black
    with pytest.raises(ValueError, match="mode I has values outside of 16 bits, or may"):
        decoded(Image.fromarray(np.array([[0, 255]], dtype=np.int32)), "TIFF")


def test_messages_about_an_image_are_the_same_every_time():
    with pytest.raises(ValueError) as told:
        images.decode(io.BytesIO(b"no image"), "here")
    assert "got here: cannot identify the image file. Replace" in str(told.value)


def test_other_colour_spaces():
    red = Image.new("RGB", (8, 8), (255, 0, 0))
    pixels, header = decoded(red.convert("CMYK"), "TIFF")
    assert pixels[0, 0].tolist() == [255, 0, 0] and header.changes == ("CMYK to RGB",)
    pixels, header = decoded(red.convert("CMYK"), "JPEG", quality=100)
    assert abs(pixels[0, 0].astype(int) - [255, 0, 0]).max() < 4
    pixels, header = decoded(red.convert("P"))
    assert pixels[0, 0].tolist() == [255, 0, 0] and header.changes == ("palette to RGB",)
    pixels, header = decoded(red.convert("1"))
    assert header.grey and header.changes == ()


@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_orientation_is_as_shown(turn, format):
    # dark left half and, of it, a bright lower end: no two turns look alike
    shown = np.full((40, 64, 3), 255, np.uint8)
    shown[:, :32] = 0
    shown[24:, :32] = 128
    # where the first row and the first column of the file belong, by the standard
    stored = {
        1: shown,
        2: shown[:, ::-1],
        3: shown[::-1, ::-1],
        4: shown[::-1],
        5: shown.swapaxes(0, 1),
        6: np.rot90(shown),
        7: shown[::-1, ::-1].swapaxes(0, 1),
        8: np.rot90(shown, 3),
    }[turn]
    exif = Image.Exif()
    exif[0x0112] = turn
    pixels, header = decoded(Image.fromarray(np.ascontiguousarray(stored)), format, exif=exif)
    assert header.size == (64, 40)
    assert abs(pixels.astype(int) - shown)[4:-4, 4:28].max() < 40
    assert header.changes == (("turned as EXIF says",) if turn > 1 else ())


def test_animations_give_their_first_frame():
    frames = [Image.new("L", (4, 4), value) for value in (0, 100, 200)]
    pixels, header = decoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert (pixels == 0).all() and "first frame of several" in header.changes


@given(st.tuples(*[st.integers(0, 255)] * 3))
def test_grey_of_colour_is_the_luminance_that_pillow_has(colour):
    from kart.data import loading

    expected = Image.new("RGB", (1, 1), colour).convert("L").getpixel((0, 0))
    chunks = loading._chunks(np.array([[[colour]]], np.uint8), np.array([0]), 1)
    assert next(chunks).tolist() == [[[[expected]]]]


def test_channels_are_those_of_the_training_images(tmp_path):
    root = tmp_path / "set"
    save_folder(root / "train", 12, mode="L")
    save_folder(root / "test", 3, start=100)
    picture(7, mode="L").save(root / "test" / "ant" / "grey.png")
    test = data.load(root, "test")
    assert test.channels == 1
    for image, number in zip(test.images[:1], [100], strict=True):
        assert np.array_equal(image[0], np.asarray(picture(number).convert("L")))
    assert test.converted == (data.Converted("colour to grey by luminance", 3),)
    assert data.load(root).converted == ()
    # the other way round
    save_folder(tmp_path / "other" / "train", 12)
    save_folder(tmp_path / "other" / "test", 3, mode="L")
    test = data.load(tmp_path / "other", "test")
    assert test.channels == 3 and (test.images == test.images[:, :1]).all()
    assert test.converted == (data.Converted("grey repeated in three channels", 3),)


def test_what_is_changed_is_counted_and_said(tmp_path, caplog):
    root = save_folder(tmp_path / "set" / "train", 12).parent
    save_folder(root / "test", 6, start=100)
    for i in range(3):
        picture(i).convert("RGBA").save(root / "train" / "ant" / f"alpha{i}.png")
    picture(0).convert("CMYK").save(root / "test" / "bee" / "c.jpg")
    found = data.describe(root)
    assert dict(found.converted) == {"transparency composited on white": 3, "CMYK to RGB": 1}
    assert found.splits["train"].modes["RGB"] + found.splits["val"].modes.get("RGB", 0) == 12
    assert found.splits["test"].formats == {"PNG": 6, "JPEG": 1}
    parts = {split: dict(data.load(root, split).converted) for split in data.SPLITS}
    assert parts["test"] == {"CMYK to RGB": 1}
    counts = [parts[split].get("transparency composited on white", 0) for split in ("train", "val")]
    assert sum(counts) == 3
    assert any("1 CMYK to RGB" in record.message for record in caplog.records)
    # once decoded it is known all the same
    assert dict(data.load(root, "test").converted) == parts["test"]


@pytest.mark.parametrize("damage", ["truncated", "empty", "text"])
def test_a_damaged_image_is_named(tmp_path, damage):
    root = save_folder(tmp_path / "set", 12)
    path = root / "bee" / "001.png"
    Image.effect_noise((200, 200), 50).save(path)
    whole = path.read_bytes()
    path.write_bytes({"truncated": whole[:2000], "empty": b"", "text": b"version https"}[damage])
    with pytest.raises(ValueError, match="whole 8- or 16-bit images, got .*bee/001.png"):
        data.load(root, image_size=5)
    found = data.describe(root)
    [message] = found.unreadable
    assert "bee/001.png" in message
    assert sum(split.images for split in found.splits.values()) == 12


def test_the_layout_of_imagenet(tmp_path):
    root = tmp_path / "imagenet"
    rng = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 3)):
        for synset in ("n01440764", "n01443537", "n02102040"):
            for i in range(count):
                shape = (int(rng.integers(40, 90)), int(rng.integers(40, 90)), 3)
                image = Image.fromarray(rng.integers(0, 256, shape).astype(np.uint8))
                image = image.convert(["RGB", "RGB", "L", "CMYK"][i % 4])
                path = root / split / synset / f"{synset}_{i}.JPEG"
                path.parent.mkdir(parents=True, exist_ok=True)
                image.save(path, "JPEG")
    (root / "LOC_synset_mapping.txt").write_text("")
    found = data.describe(root)
    assert found.classes == ("n01440764", "n01443537", "n02102040")
    assert dict(found.converted) == {"CMYK to RGB": 6, "grey repeated in three channels": 9}
    assert [item.what for item in found.unused] == ["*.txt"]
    train, val, test = (data.load(root, split, image_size=32) for split in data.SPLITS)
    assert train.images.shape[1:] == (3, 32, 32)
    assert [len(part.labels) for part in (train, val, test)] == [21, 3, 9]
    assert len(numbers(test)) == 9
