"""The tiles that `studies.tiles` tries give the same product, in Triton's interpreter."""

import sys

import interpreter
import pytest
import torch
from torch.testing import assert_close

from kart import tree
from studies import tiles


def same_products(spec):
    for kernel in tiles.KERNELS:
        job = tiles.Job(spec, "float32", 20, 1, kernel, None)
        product = tiles.drawn(job, "cpu")
        held = tiles.default(product, kernel).held
        wanted = tiles.run(product, kernel, tiles.with_tile(product, kernel, None))
        for tile in tiles.candidates(kernel, held)[::5]:
            got = tiles.run(product, kernel, tiles.with_tile(product, kernel, tile))
            tree.map(lambda a, b: assert_close(a, b, rtol=1e-4, atol=1e-4), got, wanted)


@pytest.mark.parametrize("spec", ["G3", "bspline-G8", "mexican_hat"])
def test_every_tile_gives_the_same_product(spec):
    interpreter.run(__file__, spec)


def test_tiles_need_a_gpu():
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(ValueError, match="`tiles` needs a GPU and Triton, got: "):
        tiles.main([])


def test_no_tile_that_is_tried_has_one_stage():
    for kernel in tiles.KERNELS:
        found = tiles.candidates(kernel, 4)
        assert len(found) == len(set(found)) and all(tile.stages > 1 for tile in found)


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    same_products(sys.argv[1])
