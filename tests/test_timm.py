"""The models beside timm's own, with every weight drawn; skipped where timm does not import."""

import pytest
import safetensors.torch
import torch
from torch.testing import assert_close

from kart import checkpoint, export, models, tree
from kart.bridges import timm as bridges

try:
    # its torchvision may raise anything beside a torch it was not built for
    import timm  # pyright: ignore[reportMissingImports]
except Exception as error:
    pytest.skip(f"timm does not import here: {error}", allow_module_level=True)

SIZES = {"img_size": 64, "num_classes": 7}


def donor(name, **options):
    """A model of timm's, all its parameters off their initialisation, none zero."""
    model = timm.create_model(name, **options).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for path, leaf in model.named_parameters():
            size = 0.5 if leaf.ndim == 1 or "table" in path else 0.02
            leaf.add_(size * torch.randn(leaf.shape, generator=generator))
    return model


@pytest.mark.parametrize(
    ("name", "timms"),
    [
        ("vit_tiny", "vit_tiny_patch16_224"),
        ("vit_small", "vit_small_patch16_224"),
        ("vit_base", "vit_base_patch16_224"),
        ("vit_tiny", "deit_tiny_patch16_224"),
        ("convit_tiny", "convit_tiny"),
        ("swin_tiny", "swin_tiny_patch4_window7_224"),
    ],
)
def test_logits_are_timms(name, timms):
    other = donor(timms, num_classes=7)
    model = models.create(name, num_classes=7)
    params = checkpoint.from_timm(model, other.state_dict())
    assert tree.named(params).keys() == other.state_dict().keys()
    images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted = other(images)
        assert wanted.std() > 0.1
        assert_close(model.apply(params, images), wanted, rtol=1e-5, atol=1e-5)


def test_positions_are_resized_as_timm_does():
    other, larger = donor("vit_tiny_patch16_224", **SIZES), 112
    model = models.create("vit_tiny", image_size=64, num_classes=7)
    params = checkpoint.from_timm(model, other.state_dict())
    resized, params = models.resize(model, params, larger)
    other.set_input_size((larger, larger))
    assert_close(params["pos_embed"], other.pos_embed.detach(), rtol=1e-6, atol=1e-6)
    images = torch.randn(2, 3, larger, larger, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert_close(resized.apply(params, images), other(images), rtol=1e-5, atol=1e-5)


def test_convit_is_drawn_as_local_as_timms():
    theirs = timm.create_model("convit_tiny", num_classes=7).state_dict()
    ours = tree.named(
        models.create("convit_tiny", num_classes=7).init(torch.Generator().manual_seed(0))
    )
    for name in ("v.weight", "pos_proj.weight", "pos_proj.bias", "gating_param"):
        assert torch.equal(ours[f"blocks.3.attn.{name}"], theirs[f"blocks.3.attn.{name}"])


@pytest.mark.parametrize("spec", ["G2B:rank=3", "G2U:rank=3", "2*softmax+G2B:rank=3"])
def test_models_of_timms_with_learned_operators_are_karts_and_back(spec, tmp_path):
    layer = bridges.attention(spec, tokens=17)
    other = donor("vit_tiny_patch16_224", **SIZES, depth=2, attn_layer=layer)
    model = models.create("vit_tiny", operator=spec, image_size=64, num_classes=7, depth=2)
    params = checkpoint.from_timm(model, other.state_dict())
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted = other(images)
        assert_close(model.apply(params, images), wanted, rtol=1e-5, atol=1e-5)
    export.write(tmp_path / "m.safetensors", model, params, {}, "timm")
    again = timm.create_model(
        "vit_tiny_patch16_224", **SIZES, depth=2, attn_layer=bridges.attention(spec, tokens=17)
    ).eval()
    again.load_state_dict(safetensors.torch.load_file(tmp_path / "m.safetensors"))
    with torch.no_grad():
        assert_close(again(images), wanted)
