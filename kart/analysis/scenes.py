"""Images whose object's place is known: each pasted at half its size on a crop of a photograph."""

import torch
from torch import Generator, Tensor
from torch.nn import functional as F


def photographs() -> list[Tensor]:
    """The two photographs that come with scikit-learn, `(3, height, width)` in [0, 1]."""
    try:
        from sklearn import datasets
    except ImportError as error:
        raise ValueError(
            "`scenes` needs the photographs of scikit-learn, which is not installed. Run "
            '`pip install "kart-attention[data]"`.'
        ) from error
    found = datasets.load_sample_images()
    return [torch.tensor(photo).movedim(-1, 0).float() / 255 for photo in found.images]


def grounds(generator: Generator, count: int, channels: int, size: int) -> Tensor:
    """Textured backgrounds `(count, channels, size, size)` in [0, 1]: of three crops of the
    photographs, each 1 to 3 times as wide as the image, the one of largest deviation; grey where
    `channels` is 1.
    """
    photos = photographs()
    found = []
    for _ in range(count):
        crops = []
        for draw in torch.rand(3, 4, generator=generator):
            photo = photos[int(draw[0] * len(photos))]
            height, width = photo.shape[-2:]
            side = int(min(size * (1 + 2 * float(draw[1])), height, width))
            top = int(float(draw[2]) * (height - side + 1))
            left = int(float(draw[3]) * (width - side + 1))
            crop = photo[None, :, top : top + side, left : left + side]
            crops.append(_resized(crop, size)[0])
        best = max(crops, key=lambda crop: float(crop.std()))
        found.append(best if channels == 3 else best.mean(0, keepdim=True).expand(channels, -1, -1))
    return torch.stack(found)


def pasted(generator: Generator, objects: Tensor) -> tuple[Tensor, Tensor]:
    """Objects `(B, C, size, size)` in [0, 1] at half their size, at a place drawn evenly, on
    `grounds`: images of the same shape, and boolean masks `(B, size, size)` of where they are.

    The mask is the whole square that was pasted, a quarter of the image: that is what a map of
    even weight scores in `mass_inside` and `best_iou`, and by chance in the pointing game.
    """
    count, channels, size, width = objects.shape
    if size != width or size < 4 or channels not in (1, 3):
        raise ValueError(
            "`pasted` needs square images (B, 1 or 3, size, size) of 4 pixels or more, got "
            f"{tuple(objects.shape)}. Crop them."
        )
    half = size // 2
    small = _resized(objects, half)
    images = grounds(generator, count, channels, size)
    masks = torch.zeros(count, size, size, dtype=torch.bool)
    corners = torch.randint(0, size - half + 1, (count, 2), generator=generator).tolist()
    for i, (row, column) in enumerate(corners):
        place = (slice(row, row + half), slice(column, column + half))
        images[i][:, place[0], place[1]] = small[i]
        masks[i][place] = True
    return images, masks


def _resized(images: Tensor, size: int) -> Tensor:
    options = {"mode": "bilinear", "antialias": True, "align_corners": False}
    return F.interpolate(images, (size, size), **options).clamp(0, 1)
