"""Short names of public data sets."""

from typing import NamedTuple


class Public(NamedTuple):
    """Where a public data set is on the hub, and what of it is read."""

    path: str
    config: str | None = None
    image: str = "image"
    label: str = "label"
    # the split of the source that is "test", where that is not told by the names
    test: str | None = None


SHORT = {
    "cifar10": Public("uoft-cs/cifar10", "plain_text", "img"),
    "cifar100": Public("uoft-cs/cifar100", "cifar100", "img", "fine_label"),
    "svhn": Public("ufldl-stanford/svhn", "cropped_digits"),
    "stl10": Public("tanganke/stl10"),
    "flowers102": Public("dpdl-benchmark/oxford_flowers102"),
    "mnist": Public("ylecun/mnist", "mnist"),
    "fashion_mnist": Public("zalando-datasets/fashion_mnist", "fashion_mnist"),
    "tiny_imagenet": Public("zh-plus/tiny-imagenet"),
    # the labels of its test images are not public
    "imagenet": Public("ILSVRC/imagenet-1k", test="validation"),
}
