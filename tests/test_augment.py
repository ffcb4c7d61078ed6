"""Augmentation: properties, golden values, Pillow as the reference of RandAugment."""

import hashlib
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageEnhance, ImageOps
from torch.testing import assert_close

from kart import augment

SEEDS = st.integers(0, 2**31)
SHAPES = st.sampled_from([(4, 3, 8, 8), (3, 1, 6, 10), (2, 3, 3, 5, 4), (1, 2, 9, 9)])

IMAGE_FUNCTIONS = {
    "flip": augment.flip,
    "crop": augment.crop,
    "crop_reflect": lambda g, x: augment.crop(g, x, padding=2, mode="reflect"),
    "random_resized_crop": augment.random_resized_crop,
    "color_jitter": augment.color_jitter,
    "rand_augment": augment.rand_augment,
    "rand_augment_deep": lambda g, x: augment.rand_augment(g, x, magnitude=5, layers=4, p=1.0),
}
LABEL_FUNCTIONS = {
    "mixup": augment.mixup,
    "cutmix": augment.cutmix,
    "mixup_or_cutmix": augment.mixup_or_cutmix,
    "mixup_or_cutmix_rarely": lambda g, x, y: augment.mixup_or_cutmix(g, x, y, p=0.3),
}
PIPELINES = ("none", "crop", "flip_crop", "paper", "paper_half", "small")


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images_of(shape, seed=0, dtype=torch.float32):
    return torch.rand(shape, generator=generator(seed), dtype=torch.float64).to(dtype)


def soft_labels(shape, classes=5, seed=0):
    return torch.rand((*shape[:-3], classes), generator=generator(seed)).softmax(-1)


# contracts over every function


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", IMAGE_FUNCTIONS)
def test_images_keep_shape_dtype_and_range_and_the_input(name, dtype):
    for shape in [(16, 3, 8, 8), (2, 3, 1, 6, 9)]:
        images = images_of(shape, dtype=dtype)
        before = images.clone()
        out = IMAGE_FUNCTIONS[name](generator(1), images)
        assert out.shape == images.shape and out.dtype == dtype
        assert (out >= 0).all() and (out <= 1).all()
        assert torch.equal(images, before)


@given(SEEDS, SHAPES)
@pytest.mark.parametrize("name", IMAGE_FUNCTIONS)
def test_images_depend_on_the_generator_alone(name, seed, shape):
    images = images_of(shape)
    torch.manual_seed(seed)
    state = torch.get_rng_state()
    first = IMAGE_FUNCTIONS[name](generator(seed), images)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(seed + 1)
    assert torch.equal(first, IMAGE_FUNCTIONS[name](generator(seed), images))


@pytest.mark.parametrize("name", IMAGE_FUNCTIONS)
def test_images_of_a_batch_are_treated_one_by_one(name):
    same = images_of((1, 3, 8, 8)).expand(32, -1, -1, -1)
    out = IMAGE_FUNCTIONS[name](generator(3), same)
    assert len({hashlib.sha256(image.numpy().tobytes()).hexdigest() for image in out}) > 1


@pytest.mark.parametrize("name", IMAGE_FUNCTIONS)
def test_leading_axes_are_more_images(name):
    images = images_of((6, 3, 8, 8))
    stacked = IMAGE_FUNCTIONS[name](generator(3), images.reshape(2, 3, 3, 8, 8))
    assert_close(stacked.reshape(6, 3, 8, 8), IMAGE_FUNCTIONS[name](generator(3), images))


@given(SEEDS, SHAPES)
@pytest.mark.parametrize("name", LABEL_FUNCTIONS)
def test_mixed_labels_sum_to_one(name, seed, shape):
    images, labels = images_of(shape), soft_labels(shape)
    copies = images.clone(), labels.clone()
    out, targets = LABEL_FUNCTIONS[name](generator(seed), images, labels)
    assert out.shape == images.shape and out.dtype == images.dtype
    assert targets.shape == labels.shape and targets.dtype == labels.dtype
    assert_close(targets.sum(-1), torch.ones(shape[:-3]))
    assert (targets >= 0).all() and (out >= 0).all() and (out <= 1 + 1e-6).all()
    assert torch.equal(images, copies[0]) and torch.equal(labels, copies[1])
    again = LABEL_FUNCTIONS[name](generator(seed), images, labels)
    assert torch.equal(out, again[0]) and torch.equal(targets, again[1])


@given(SEEDS, SHAPES)
@pytest.mark.parametrize("name", PIPELINES)
def test_pipelines_keep_shapes_and_targets_sum_to_one(name, seed, shape):
    images = images_of(shape)
    labels = torch.randint(5, shape[:-3], generator=generator(seed))
    run = augment.pipeline(name)
    size = 9
    out, targets = run(generator(seed), images, labels, 5, size)
    assert out.shape == (*shape[:-2], size, size) and targets.shape == (*shape[:-3], 5)
    assert_close(targets.sum(-1), torch.ones(shape[:-3]))
    again = run(generator(seed), images, labels, 5, size)
    assert torch.equal(out, again[0]) and torch.equal(targets, again[1])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("name", PIPELINES)
def test_pipelines_agree_between_devices(name):
    images, labels = images_of((64, 3, 32, 32)), torch.arange(64) % 10
    # whole grey levels: an operation that cuts at a level must not meet a rounding difference
    images = (images * 255).round() / 255
    on_cpu = augment.pipeline(name)(generator(0), images, labels, 10, 32)
    on_gpu = augment.pipeline(name)(generator(0), images.cuda(), labels.cuda(), 10, 32)
    assert_close(on_gpu[1].cpu(), on_cpu[1])
    wrong = (on_gpu[0].cpu() - on_cpu[0]).abs() > 1e-3
    assert wrong.float().mean() < 1e-3  # a grey level may fall on the other side of a threshold


# flips and crops


@given(SEEDS, SHAPES)
def test_flip_twice_is_the_identity(seed, shape):
    images = images_of(shape)
    once = augment.flip(generator(seed), images)
    assert torch.equal(augment.flip(generator(seed), once), images)


def test_flip_by_hand():
    image = torch.tensor([[[[0.1, 0.2], [0.3, 0.4]]]])
    mirrored = torch.tensor([[[[0.2, 0.1], [0.4, 0.3]]]])
    assert torch.equal(augment.flip(generator(0), image, p=1.0), mirrored)
    assert torch.equal(augment.flip(generator(0), image, p=0.0), image)
    many = augment.flip(generator(0), image.expand(1000, -1, -1, -1))
    share = (many == mirrored).flatten(1).all(1).float().mean()
    assert abs(share - 0.5) < 0.05


@given(SEEDS, SHAPES)
@pytest.mark.parametrize("mode", ["zero", "reflect"])
def test_crop_without_padding_is_the_identity(mode, seed, shape):
    images = images_of(shape)
    assert torch.equal(augment.crop(generator(seed), images, padding=0, mode=mode), images)


@given(SEEDS, st.integers(1, 3))
def test_crop_is_one_of_the_shifts(seed, padding):
    image = images_of((1, 2, 5, 4)) + 0.001
    out = augment.crop(generator(seed), image, padding)
    padded = torch.nn.functional.pad(image, (padding,) * 4)
    shifts = [
        padded[..., y : y + 5, x : x + 4]
        for y in range(2 * padding + 1)
        for x in range(2 * padding + 1)
    ]
    assert sum(torch.equal(out, shifted) for shifted in shifts) == 1


def test_crop_reaches_every_shift_evenly():
    image = torch.zeros(1, 1, 3, 3)
    image[..., 1, 1] = 1
    out = augment.crop(generator(0), image.expand(9000, -1, -1, -1), padding=1)
    counts = out.sum(0)[0]
    assert counts.sum() == 9000 and (counts - 1000).abs().max() < 150


def test_crop_reflects():
    image = torch.tensor([[[[1.0, 2.0, 3.0]] * 3]]) / 3
    out = augment.crop(generator(0), image.expand(200, -1, -1, -1), padding=1, mode="reflect")
    rows = {tuple((3 * row).round().int().tolist()) for row in out[:, 0, 0]}
    assert rows == {(2, 1, 2), (1, 2, 3), (2, 3, 2)}


@given(SEEDS, SHAPES)
def test_random_resized_crop_of_everything_is_the_identity(seed, shape):
    images = images_of(shape)
    aspect = shape[-1] / shape[-2]
    out = augment.random_resized_crop(generator(seed), images, (1.0, 1.0), (aspect, aspect))
    assert_close(out, images, atol=1e-5, rtol=0)


def test_random_resized_crop_is_a_resized_box():
    image = images_of((1, 1, 6, 7), dtype=torch.float64)
    boxes = [
        torch.nn.functional.interpolate(
            image[..., y : y + h, x : x + w], size=(6, 7), mode="bilinear"
        )
        for h in range(1, 7)
        for w in range(1, 8)
        for y in range(7 - h)
        for x in range(8 - w)
    ]
    for seed in range(50):
        out = augment.random_resized_crop(generator(seed), image)
        assert min((out - box).abs().max() for box in boxes) < 1e-9


def test_random_resized_crop_keeps_scale_and_ratio():
    # on a ramp the box can be read off the slope
    y, x = torch.meshgrid(torch.arange(64) + 0.5, torch.arange(64) + 0.5, indexing="ij")
    image = (torch.stack([y, x])[None] / 64).double().expand(4000, -1, -1, -1)
    out = augment.random_resized_crop(generator(0), image)
    height = (out[:, 0, 40, 32] - out[:, 0, 24, 32]) * 4
    width = (out[:, 1, 32, 40] - out[:, 1, 32, 24]) * 4
    area, ratio = height * width, width / height
    assert area.min() > 0.07 and area.max() <= 1.0001
    assert ratio.min() > 0.6 and ratio.max() < 1.65
    assert abs(area.mean() - 0.5) < 0.05  # boxes that do not fit are drawn again: below 0.54
    assert abs(ratio.log().mean()) < 0.02


def test_random_resized_crop_reaches_every_place_evenly():
    image = (torch.arange(9.0) / 9).reshape(1, 1, 3, 3).expand(4500, -1, -1, -1)
    out = augment.random_resized_crop(generator(0), image, (1 / 9, 1 / 9), (1.0, 1.0))
    counts = (out[:, 0, 1, 1] * 9).round().long().bincount(minlength=9)
    assert (counts - 500).abs().max() < 100


def test_random_resized_crop_falls_back_to_the_centre():
    image = images_of((1, 1, 4, 16), dtype=torch.float64)
    out = augment.random_resized_crop(generator(0), image, (1.0, 1.0), (1.0, 1.0))
    expected = torch.nn.functional.interpolate(image[..., 6:10], size=(4, 16), mode="bilinear")
    assert_close(out, expected)


# colours


@given(SEEDS, SHAPES)
def test_color_jitter_of_strength_zero_is_the_identity(seed, shape):
    images = images_of(shape)
    assert_close(augment.color_jitter(generator(seed), images, strength=0.0), images)


def test_color_jitter_keeps_grey_grey():
    grey = images_of((8, 1, 5, 5)).expand(-1, 3, -1, -1)
    out = augment.color_jitter(generator(0), grey)
    assert_close(out[:, :1].expand(-1, 3, -1, -1), out)


def test_grey_levels_are_taken_where_the_images_are_whatever_the_default_device():
    images = images_of((2, 3, 5, 5))
    with torch.device("meta"):
        found = augment._grey(images)
    assert_close(found, augment._grey(images))


# every operation of RandAugment against Pillow, on bytes

LEVELS = (0.0, 0.23, 0.5, 0.77, 1.0)


def _pil_affine(*matrix):
    return lambda image: image.transform(
        image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR, fillcolor=(128,) * 3
    )


def _pil(name, level, sign):
    factor = max(0.1, 1 + sign * 0.9 * level)
    threshold, added = 256 - int(level * 256), int(level * 110)
    table = [min(255, i + added) if i < 128 else i for i in range(256)] * 3
    shift, shear = 0.45 * level * sign, 0.3 * level * sign
    return {
        "autocontrast": ImageOps.autocontrast,
        "equalize": ImageOps.equalize,
        "invert": ImageOps.invert,
        "rotate": lambda i: i.rotate(
            30 * level * sign, Image.Resampling.BILINEAR, fillcolor=(128,) * 3
        ),
        # Pillow refuses 0 bits of late; by its formula they are black
        "posterize": lambda i: (
            ImageOps.posterize(i, 4 - int(level * 4)) if level < 1 else i.point([0] * 768)
        ),
        "solarize": lambda i: ImageOps.solarize(i, threshold),
        "solarize_add": lambda i: i.point(table),
        "color": lambda i: ImageEnhance.Color(i).enhance(factor),
        "contrast": lambda i: ImageEnhance.Contrast(i).enhance(factor),
        "brightness": lambda i: ImageEnhance.Brightness(i).enhance(factor),
        "sharpness": lambda i: ImageEnhance.Sharpness(i).enhance(factor),
        "shear_x": lambda i: _pil_affine(1, shear, 0, 0, 1, 0)(i),
        "shear_y": lambda i: _pil_affine(1, 0, 0, shear, 1, 0)(i),
        "translate_x": lambda i: _pil_affine(1, 0, shift * i.width, 0, 1, 0)(i),
        "translate_y": lambda i: _pil_affine(1, 0, 0, 0, 1, shift * i.height)(i),
    }[name]


@pytest.mark.parametrize("name", augment.OPERATIONS)
def test_operations_agree_with_pillow(name):
    # smooth and dark, so that contrast has to be made and sampling has gradients to follow
    rng = np.random.default_rng(0)
    coarse = rng.integers(20, 180, size=(6, 6, 3)).astype(np.uint8)
    image = Image.fromarray(coarse).resize((40, 32), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255
    for level in LEVELS:
        for sign in (-1.0, 1.0):
            expected = np.array(_pil(name, level, sign)(image), dtype=np.float64)
            amount = torch.full((1, 1, 1, 1), level, dtype=torch.float64)
            out = augment.OPERATIONS[name](
                pixels, amount, sign * torch.ones_like(amount), 128 / 255
            )
            difference = np.abs(out[0].permute(1, 2, 0).double().numpy() * 255 - expected)
            if name in ("invert", "posterize", "solarize", "solarize_add", "equalize"):
                assert difference.max() < 1e-3, (level, sign)
            else:
                # Pillow rounds to whole levels on the way; on the rim of a turned image it may
                # decide otherwise whether a pixel is inside
                assert (difference > 2.01).mean() < 0.005, (level, sign, difference.max())


def test_operations_are_those_of_timm():
    assert len(augment.OPERATIONS) == 15


def test_rand_augment_without_layers_or_chance_is_the_identity():
    images = images_of((5, 3, 8, 8))
    assert torch.equal(augment.rand_augment(generator(0), images, layers=0), images)
    assert torch.equal(augment.rand_augment(generator(0), images, p=0.0), images)


def test_rand_augment_leaves_a_quarter_alone():
    # each of two layers acts with probability one half
    images = images_of((2000, 3, 4, 4))
    out = augment.rand_augment(generator(0), images)
    untouched = (out == images).flatten(1).all(1).float().mean()
    assert 0.22 < untouched < 0.30  # and small images cannot be equalized


@given(st.lists(st.integers(0, 255), min_size=64, max_size=64))
def test_autocontrast_fills_the_range_and_equalize_keeps_the_order(levels):
    image = torch.tensor(levels).reshape(1, 1, 8, 8) / 255
    zero = torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    stretched = augment.OPERATIONS["autocontrast"](image, zero, zero, 0.5)
    if len(set(levels)) > 1:
        assert stretched.min() == 0 and stretched.max() == 1
    else:
        assert torch.equal(stretched, image)
    big = image.repeat(1, 1, 8, 8)
    equal = augment.OPERATIONS["equalize"](big, zero, zero, 0.5).flatten()
    order = big.flatten().argsort(stable=True)
    assert (equal[order].diff() >= 0).all()


# mixing


@given(SEEDS, st.integers(4, 12), st.integers(4, 12), st.integers(2, 5))
def test_cutmix_labels_are_the_areas(seed, height, width, batch):
    # image i is the constant i / batch, its label the i-th class
    index = torch.arange(batch)
    images = (index / batch)[:, None, None, None].expand(-1, 3, height, width)
    out, targets = augment.cutmix(generator(seed), images, torch.eye(batch))
    for i in range(batch):
        own = (out[i, 0] == images[i, 0]).float().mean()
        if i == batch - 1 - i:
            own = torch.tensor(1.0)
        assert_close(targets[i, i], own)
        assert_close(targets[i].sum(), torch.tensor(1.0))
    # every pixel keeps its place: the batch's values at a pixel are its own or all reversed
    kept = (out == images).flatten(1)
    changed = (out == images.flip(0)).flatten(1)
    assert (kept | changed).all()


def test_cutmix_box_is_a_rectangle_of_the_expected_area():
    images = torch.arange(2.0)[:, None, None, None].expand(-1, 1, 32, 32)
    shares = []
    for seed in range(300):
        out, targets = augment.cutmix(generator(seed), images, torch.eye(2))
        box = out[0, 0] == 1
        rows, columns = box.any(1).nonzero(), box.any(0).nonzero()
        if box.any():
            height, width = (int(i.max() - i.min()) + 1 for i in (rows, columns))
            assert box.sum() == height * width
        shares.append(float(targets[0, 1]))
    # uniform area cut at the border; without the cut the mean would be one half
    assert 0.2 < sum(shares) / len(shares) < 0.4


@given(SEEDS)
def test_mixup_blends_images_as_labels(seed):
    labels = torch.eye(4)
    images = labels[:, :, None, None].expand(-1, -1, 2, 2)
    out, targets = augment.mixup(generator(seed), images, labels)
    assert_close(out.mean((-1, -2)), targets)
    assert_close(targets[0, 0], targets[3, 3])  # one share for the batch
    assert_close(targets[0, 0] + targets[0, 3], torch.tensor(1.0))


def test_mixup_shares_follow_the_beta_distribution():
    many = torch.zeros(4000, 2, 1, 1, 1)  # 4000 batches of two
    labels = torch.eye(2).expand(4000, 2, 2)
    for alpha in (0.2, 0.8, 3.0):
        share = augment.mixup(generator(0), many, labels, alpha)[1][:, 0, 0]
        assert abs(share.mean() - 0.5) < 0.03
        assert abs(share.var() / (1 / (4 * (2 * alpha + 1))) - 1) < 0.1


def test_mixup_or_cutmix_chooses_by_its_probabilities():
    images, labels = images_of((4, 3, 8, 8)), torch.eye(4)
    assert augment.mixup_or_cutmix(generator(0), images, labels, p=0.0)[0] is images
    cut = augment.mixup_or_cutmix(generator(0), images, labels, switch=1.0)[0]
    pixels = torch.stack([images, images.flip(0)])
    assert ((cut == pixels[0]) | (cut == pixels[1])).all()
    mixed = 0
    for seed in range(400):
        out, _ = augment.mixup_or_cutmix(generator(seed), images, labels)
        mixed += not ((out == pixels[0]) | (out == pixels[1])).all()
    assert 160 < mixed < 240


# labels, pipelines, resizing


def test_one_hot_by_hand():
    assert_close(
        augment.one_hot(torch.tensor([2, 0]), 4, smoothing=0.1),
        torch.tensor([[0.025, 0.025, 0.925, 0.025], [0.925, 0.025, 0.025, 0.025]]),
    )
    assert torch.equal(augment.one_hot(torch.tensor([[1]]), 2), torch.tensor([[[0.0, 1.0]]]))


def test_pipeline_none_and_crop_by_hand():
    images, labels = images_of((6, 1, 8, 8)), torch.arange(6)
    out, targets = augment.pipeline("none")(generator(0), images, labels, 6, 8)
    assert torch.equal(out, images) and torch.equal(targets, torch.eye(6))
    # an eighth of the side: the digits move by one pixel
    out, _ = augment.pipeline("crop")(generator(0), images, labels, 6, 8)
    assert torch.equal(out, augment.crop(generator(0), images, padding=1))
    out, _ = augment.pipeline("flip_crop")(generator(0), images_of((6, 3, 32, 32)), labels, 6, 32)
    both = generator(0)
    expected = augment.flip(both, augment.crop(both, images_of((6, 3, 32, 32)), padding=4))
    assert torch.equal(out, expected)


def test_pipeline_paper_smooths_labels_and_mixes():
    images, labels = images_of((8, 3, 16, 16)), torch.zeros(8, dtype=torch.int64)
    out, targets = augment.pipeline("paper")(generator(0), images, labels, 10, 16)
    assert_close(targets[0], torch.tensor([0.91] + [0.01] * 9))
    assert not torch.equal(out, images)
    assert augment.smoothing("paper") == 0.1 and augment.smoothing("flip_crop") == 0


@pytest.mark.parametrize(("name", "share"), [("paper", 1.0), ("paper_half", 0.5)])
def test_the_two_readings_of_half_and_half_mix_all_or_half_of_the_batches(name, share):
    images, labels = images_of((2, 3, 8, 8)), torch.tensor([0, 1])
    targets = [augment.pipeline(name)(generator(i), images, labels, 2, 8)[1] for i in range(200)]
    own = torch.tensor([0.95, 0.05])
    mixed = sum(bool((one[0] - own).abs().max() > 1e-6) for one in targets) / len(targets)
    # a cutmix box can be empty: such a batch counts as not mixed
    assert share - 0.12 < mixed <= min(1.0, share + 0.12)


def test_the_papers_crop_is_scaled_once_to_the_size_of_the_model():
    images = images_of((4, 3, 16, 16))
    out = augment.random_resized_crop(generator(3), images, size=40)
    assert out.shape == (4, 3, 40, 40)
    # the whole image as the box: the crop is the resizing of the whole
    whole = augment.random_resized_crop(generator(3), images, (1.0, 1.0), (1.0, 1.0), size=40)
    assert_close(whole, augment.resize(images, 40), atol=1e-5, rtol=0)


@given(SHAPES)
def test_resize_keeps_constants_and_its_own_size(shape):
    image = torch.full(shape, 0.3)
    assert_close(augment.resize(image, 13), torch.full((*shape[:-2], 13, 13), 0.3))
    square = images_of((*shape[:-2], 7, 7))
    assert torch.equal(augment.resize(square, 7), square)


def test_resize_by_hand():
    image = torch.tensor([[[0.0, 1.0], [0.0, 1.0]]])
    row = torch.tensor([0.0, 0.25, 0.75, 1.0])
    assert_close(augment.resize(image, 4), row.expand(1, 4, 4))
    assert_close(augment.resize(image, 1), torch.tensor([[[0.5]]]))
    assert_close(
        augment.resize(images_of((2, 3, 64, 64)), 4).mean(), torch.tensor(0.5), atol=0.02, rtol=0
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_resize_of_other_dtypes_is_that_of_float32(dtype):
    image = images_of((2, 3, 20, 20)).to(dtype)
    for size in (8, 31):
        out = augment.resize(image, size)
        assert out.dtype == dtype
        assert_close(out.float(), augment.resize(image.float(), size), atol=4e-3, rtol=0)


def test_resize_is_antialiased_along_the_side_that_shrinks_alone():
    rows = images_of((2, 3, 100, 1))
    narrow, wide = (rows.expand(-1, -1, -1, width) for width in (32, 100))
    assert_close(augment.resize(narrow, 40), augment.resize(wide, 40))


def test_center_crop_is_timms_resize_and_cut():
    images = images_of((2, 3, 32, 32))
    scaled = augment.resize(images, 248)  # floor(224 / 0.9)
    assert torch.equal(augment.center_crop(images, 224), scaled[..., 12:236, 12:236])
    assert torch.equal(augment.center_crop(images, 32, 1.0), images)
    rim = torch.zeros(1, 10, 10)
    rim[..., 1:-1, 1:-1] = 1
    assert_close(augment.center_crop(rim, 8, 0.8), torch.ones(1, 8, 8))


# bad input


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda g, x: augment.flip(g, x, p=1.5), "`flip` needs `p` in \\[0, 1\\], got 1.5"),
        (lambda g, x: augment.flip(g, (x * 255).byte()), "float images .* got torch.uint8"),
        (lambda g, x: augment.flip(g, x[0]), "`flip` needs float images .* \\(3, 8, 8\\)"),
        (lambda g, x: augment.flip(0, x), "torch.Generator on the CPU, got 0"),
        (lambda g, x: augment.crop(g, x, padding=-1), "`padding` >= 0"),
        (lambda g, x: augment.crop(g, x, padding=8, mode="reflect"), "below the sides 8 x 8"),
        (lambda g, x: augment.crop(g, x, mode="wrap"), "'zero' or 'reflect', got 'wrap'"),
        (lambda g, x: augment.random_resized_crop(g, x, (0.0, 1.0)), "`scale`"),
        (lambda g, x: augment.random_resized_crop(g, x, ratio=(2.0, 1.0)), "`ratio`"),
        (lambda g, x: augment.random_resized_crop(g, x, size=0), "an integer `size` >= 1, got 0"),
        (lambda g, x: augment.rand_augment(g, x, magnitude=math.nan), "finite `magnitude`"),
        (lambda g, x: augment.color_jitter(g, x, 2.0), "`strength` in \\[0, 1\\], got 2.0"),
        (lambda g, x: augment.rand_augment(g, x, layers=-1), "`layers`"),
        (lambda g, x: augment.mixup(g, x, torch.arange(4)), "needs soft labels .* torch.int64"),
        (lambda g, x: augment.mixup(g, x, torch.eye(3)), "soft labels \\(4, 'classes'\\)"),
        (lambda g, x: augment.mixup(g, x, torch.eye(4), alpha=0.0), "`alpha` > 0, got 0.0"),
        (lambda g, x: augment.cutmix(g, x, torch.eye(4), alpha=math.nan), "`alpha` > 0, got nan"),
        (lambda g, x: augment.cutmix(g, x, torch.eye(4), alpha=math.inf), "finite `alpha` > 0"),
        (lambda g, x: augment.mixup_or_cutmix(g, x, torch.eye(4), switch=2), "`switch`"),
        (lambda g, x: augment.one_hot(torch.tensor([3]), 3), "labels in 0..2, got 3..3"),
        (lambda g, x: augment.one_hot(torch.tensor([-1]), 3), "labels in 0..2, got -1..-1"),
        (lambda g, x: augment.one_hot(torch.tensor([1.0]), 3), "int64 labels, got torch.float32"),
        (lambda g, x: augment.pipeline("flipcrop"), "got 'flipcrop'. Near: flip_crop"),
        (lambda g, x: augment.pipeline("none")(g, x.byte(), torch.arange(4), 4, 8), "float images"),
        (lambda g, x: augment.resize(x, 0), "`size` >= 1"),
        (lambda g, x: augment.center_crop(x, 8, 0.0), "`ratio` in \\(0, 1\\]"),
        (lambda g, x: augment.flip(g, x, p="half"), "`p` in \\[0, 1\\], got 'half'"),
        (lambda g, x: augment.crop(g, x, padding=2.5), "an integer `padding` >= 0, got 2.5"),
        (lambda g, x: augment.random_resized_crop(g, x, size=2.5), "`size` >= 1, got 2.5"),
        (lambda g, x: augment.rand_augment(g, x, layers=1.5), "integer `layers` >= 0, got 1.5"),
        (lambda g, x: augment.rand_augment(g, x, fill=math.nan), "`fill` in \\[0, 1\\], got nan"),
        (lambda g, x: augment.resize(x, 2.5), "an integer `size` >= 1, got 2.5"),
        (lambda g, x: augment.one_hot([1, 2], 3), "needs int64 labels, got list"),
        (lambda g, x: augment.pipeline(None), "got None. Near: none"),
        (lambda g, x: augment.pipeline(["none"]), "got \\['none'\\]. Near: none"),
        (lambda g, x: augment.mixup(g, x, torch.eye(4), alpha="1"), "`alpha` > 0, got '1'"),
        (lambda g, x: augment.mixup(g, x, [[1.0]] * 4), "soft labels .*, got list"),
        (lambda g, x: augment.mixup(g, None, torch.eye(4)), "float images .*, got NoneType"),
        (lambda g, x: augment.color_jitter(g, x, "0.4"), "`strength` in \\[0, 1\\], got '0.4'"),
        (lambda g, x: augment.rand_augment(g, x, std=None), "finite .* got 15 and None"),
        (lambda g, x: augment.random_resized_crop(g, x, scale=0.5), "got 0.5 and"),
        (lambda g, x: augment.random_resized_crop(g, x, ratio=(1.0,)), "and \\(1.0,\\)"),
        (lambda g, x: augment.center_crop(torch.rand(8), 8), "square images .* \\(8,\\)"),
        (lambda g, x: augment.center_crop(x, 8, "0.9"), "`ratio` in \\(0, 1\\], .* '0.9'"),
        (lambda g, x: augment.resize([1], 8), "float images .*, got list"),
        (lambda g, x: augment.one_hot(torch.tensor([1]), "3"), "integer `num_classes` >= 1"),
    ],
)
def test_bad_input_is_named(call, words):
    with pytest.raises(ValueError, match=words):
        call(generator(0), images_of((4, 3, 8, 8)))
