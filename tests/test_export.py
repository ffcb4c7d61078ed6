"""`kart export` and `kart predict`: the files give the run's logits, the images their classes."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from torch.testing import assert_close

from kart import bases, checkpoint, cli, data, export, models, nn, operators, runs, tree
from kart.bridges import timm
from kart.commands import predict
from kart.models import blocks

FLAGS = [
    *("--epochs", "1", "--batch-size", "64", "--embed-dim", "8", "--depth", "2", "--num-heads"),
    *("2", "--patch-size", "4", "--rank", "3", "--train-limit", "256", "--threads", "1"),
    *("--quiet", "--learning-rate", "0.01"),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "G2B"
    assert cli.main(["train", "--operator", "G2B", *FLAGS, "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def expected(run):
    """Standardised images and the logits of the run."""
    own = runs.only(run)
    dataset = data.load("digits", "val")
    pixels, _ = data.take(dataset, torch.arange(5))
    images = data.normalise(pixels, own.identity.data["mean"], own.identity.data["std"])
    with torch.no_grad():
        return images, own.model.apply(own.params, images)


def write(run, path, form):
    assert cli.main(["export", str(run), "--out", str(path), "--format", form]) == 0
    about = json.loads(path.with_suffix(".json").read_text())
    assert about["classes"][3] == "3" and len(about["mean"]) == len(about["std"]) == 1
    assert about["run"] == runs.read(run).id and about["image_size"] == 8
    assert about["image"] == [1, 8, 8]


def test_kart_reads_its_own_file_in_a_line(run, expected, tmp_path):
    write(run, tmp_path / "m.safetensors", "safetensors")
    params, config = checkpoint.load(tmp_path / "m.safetensors")
    logits = models.from_config(config).apply(params, expected[0])
    assert_close(logits, expected[1], rtol=0, atol=1e-5)


def test_the_names_are_timms(run, tmp_path):
    write(run, tmp_path / "m.safetensors", "timm")
    found = safetensors.torch.load_file(tmp_path / "m.safetensors")
    assert {"cls_token", "pos_embed", "patch_embed.proj.weight", "head.bias"} <= set(found)
    assert "blocks.1.attn.qkv.weight" in found
    one = runs.only(run)
    again = checkpoint.from_timm(one.model, found)
    tree.map(lambda a, b: assert_close(a, b, rtol=0, atol=0), again, one.params)


@pytest.mark.parametrize("spec", ["G2B:rank=3", "G2U:rank=3", "softmax+G2B:rank=3"])
def test_operators_are_where_the_bridge_to_timm_has_them_and_come_back(spec, tmp_path):
    model = models.create("vit_nano", operator=spec, image_size=8, patch_size=4, depth=2)
    params = model.init(torch.Generator().manual_seed(0))
    export.write(tmp_path / "m.safetensors", model, params, {}, "timm")
    found = safetensors.torch.load_file(tmp_path / "m.safetensors")
    layer = timm.attention(spec, tokens=5)
    for i in range(2):
        own = f"blocks.{i}.attn."
        there = {name: leaf for name, leaf in found.items() if name.startswith(own)}
        module = layer(64, num_heads=2, qkv_bias=True)
        module.load_state_dict({name.removeprefix(own): leaf for name, leaf in there.items()})
    again = checkpoint.from_timm(model, {f"module.{name}": x for name, x in found.items()})
    tree.map(lambda a, b: assert_close(a, b, rtol=0, atol=0), again, params)


def test_a_donor_with_several_operators_is_not_one_that_all_blocks_share():
    names = {"operator": "G2B:rank=3", "image_size": 8, "patch_size": 4, "depth": 2}
    model = models.create("vit_nano", **names)
    params = checkpoint.bridged(model.init(torch.Generator().manual_seed(0)))
    universal = models.create("vit_nano", **names | {"operator": "G2U:rank=3"})
    with pytest.raises(ValueError, match="one operator for all blocks, got several, which differ"):
        checkpoint.from_timm(universal, params)


@pytest.mark.filterwarnings("ignore:The given buffer is not writable")  # torch 2.11 of its own file
def test_the_graph_of_torch_export_takes_any_batch(run, expected, tmp_path):
    write(run, tmp_path / "m.pt2", "torch")
    module = torch.export.load(tmp_path / "m.pt2").module()
    images, logits = expected
    for count in (1, 2, 5):
        assert_close(module(images[:count]), logits[:count], rtol=0, atol=1e-5)


def test_a_member_of_several_is_exported_without_the_others(tmp_path):
    model = models.create("vit_nano", image_size=8, patch_size=4, depth=1)
    params = model.init(torch.Generator().manual_seed(0))
    sizes = []
    for i, own in enumerate((params, tree.unstack(tree.stack([params] * 4))[3])):
        path = tmp_path / f"{i}.pt2"
        export.write(path, model, own, {}, "torch")  # nor does torch warn
        sizes.append(path.stat().st_size)
    assert sizes[1] < 1.1 * sizes[0]


def test_the_graph_runs_where_kart_is_not(tmp_path):
    bumps = bases.linear(lambda x: x[..., None] ** torch.arange(3) / 9, 3, family="bumps")
    own = operators.hybrid([operators.low_rank(bumps, 2), operators.parse("G1B:rank=2").operator])
    sizes = {"image_size": 8, "patch_size": 4, "in_channels": 1, "num_classes": 5}
    model = models.create("vit_nano", own, embed_dim=8, depth=1, num_heads=2, **sizes)
    params = model.init(torch.Generator().manual_seed(0))
    images = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    export.write(tmp_path / "m.pt2", model, params, {}, "torch")
    torch.save(images, tmp_path / "images.pt")
    text = (
        "import sys, torch; sys.modules['kart'] = None; program = torch.export.load('m.pt2'); "
        "torch.save(program.module()(torch.load('images.pt')).detach(), 'logits.pt')"
    )
    subprocess.run([sys.executable, "-c", text], cwd=tmp_path, check=True, timeout=120)
    found = torch.load(tmp_path / "logits.pt")
    assert_close(found, model.apply(params, images), rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # torch's own use of it
@pytest.mark.parametrize(
    "spec",
    ["G2B:rank=3", "bspline-G3B:rank=2,base=softmax", "G2:order=by_distance,inside=true"],
)
def test_a_module_of_ones_own_is_recorded_in_operations_of_torch(spec, tmp_path, session):
    generator = torch.Generator().manual_seed(0)
    attention = nn.Attention(8, heads=2, tokens=5, operator=spec, generator=generator)
    module = torch.nn.Sequential(torch.nn.LayerNorm(8), attention).eval()
    batch = ({0: torch.export.Dim("batch")},)
    found = export.graph(module, (torch.zeros(2, 5, 8),), batch)
    assert not [node for node in found.graph.nodes if "kart" in str(node.target)]
    path = tmp_path / "m.onnx"
    torch.onnx.export(found, input_names=["images"], verbose=False).save(str(path))
    tokens = torch.randn(3, 5, 8, generator=generator)
    with torch.no_grad():
        expected = module(tokens)
        assert_close(found.module()(tokens), expected, rtol=1e-5, atol=1e-5)
    assert_close(session(path, tokens), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "spec",
    [
        *("sigmoid", "relu", "G3:order=elementwise", "bspline:order=elementwise,inside=true"),
        *("G3:order=by_distance,normalise=count", "G3:order=by_distance,inside=true"),
    ],
)
def test_the_graph_of_an_operator_of_any_length_is_of_any_length(spec):
    generator = torch.Generator().manual_seed(0)
    module = nn.Attention(64, heads=1, tokens=17, operator=spec, generator=generator).eval()
    free = ({0: torch.export.Dim("batch"), 1: torch.export.Dim("tokens", min=2)},)
    program = torch.export.export(module, (torch.zeros(2, 17, 64),), dynamic_shapes=free)
    for samples, tokens in ((3, 2), (2, 17), (4, 40)):
        x = torch.randn(samples, tokens, 64, generator=generator)
        assert_close(program.module()(x), module(x), rtol=0, atol=1e-5)


def test_onnx_without_its_packages_is_one_line(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: None)
    argv = ["export", str(run), "--out", str(tmp_path / "m.onnx"), "--format", "onnx"]
    assert cli.main(argv) == 2
    error = capsys.readouterr().err
    assert "pip install onnx onnxscript" in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.fixture
def session():
    """Runs an ONNX file on images."""
    for name in ("onnx", "onnxscript"):
        pytest.importorskip(name)
    library = pytest.importorskip("onnxruntime")

    def run(path, images):
        return torch.from_numpy(
            library.InferenceSession(str(path)).run(None, {"images": images.numpy()})[0]
        )

    return run


def test_onnx_gives_the_runs_logits(run, expected, tmp_path, session):
    write(run, tmp_path / "m.onnx", "onnx")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.json", "m.onnx"]
    images, logits = expected
    for count in (1, 2, 5):
        found = session(tmp_path / "m.onnx", images[:count])
        assert_close(found, logits[:count], rtol=0, atol=1e-5)


def test_attention_that_meets_its_projections_first_says_nothing_and_is_right(
    tmp_path, session, capfd, monkeypatch
):
    taken = []
    way = blocks.projected
    monkeypatch.setattr(blocks, "projected", lambda *x: (taken.append(0), way(*x))[1])
    sizes = {"image_size": 8, "patch_size": 2, "in_channels": 1, "num_classes": 3}
    model = models.create("vit_nano", "G1B", embed_dim=32, depth=1, num_heads=2, rank=2, **sizes)
    params = tree.map(lambda x: x + 0.02, model.init(torch.Generator().manual_seed(0)))
    images = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    logits = model.apply(params, images)
    assert len(taken) == 1
    export.write(tmp_path / "m.pt2", model, params, {}, "torch")
    export.write(tmp_path / "m.onnx", model, params, {}, "onnx")
    assert len(taken) > 2
    assert capfd.readouterr().err == ""
    module = torch.export.load(tmp_path / "m.pt2").module()
    for count in (1, 3):
        assert_close(module(images[:count]), logits[:count], rtol=0, atol=1e-5)
        found = session(tmp_path / "m.onnx", images[:count])
        assert_close(found, logits[:count], rtol=0, atol=1e-5)


@pytest.mark.parametrize("spec", ["G1B", "G1:order=full_rank"])
def test_any_batch_where_there_are_as_many_heads_as_images_of_the_example(spec):
    sizes = {"image_size": 8, "patch_size": 2, "in_channels": 1, "num_classes": 3}
    model = models.create("vit_nano", spec, embed_dim=16, depth=1, num_heads=2, **sizes)
    params = model.init(torch.Generator().manual_seed(0))
    module = export.program(model, params).module()
    for count in (1, 2, 5):
        images = torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(1))
        assert_close(module(images), model.apply(params, images), rtol=0, atol=1e-5)


# a block each, so that one graph has them all; the others are minutes
GRAPHS = [
    pytest.param(("softmax", "G3B", "polynomial-1B"), id="blocks"),
    *(
        pytest.param(spec, marks=pytest.mark.slow)
        for spec in (
            *("G3U", "G3B:base=softmax", "G3B:order=full_rank", "G3B:order=elementwise"),
            *("rational-5/4B", "bspline-8B", "softconv", "G3B:order=by_distance,inside=true"),
            *("G3B:order=by_distance", "G3B:order=generated", "G3B:order=by_offset", "static"),
        )
    ),
]


@pytest.mark.parametrize("operator", GRAPHS)
def test_onnx_of_every_kind_of_operator(operator, tmp_path, session):
    depth = len(operator) if isinstance(operator, tuple) else 1
    sizes = {"image_size": 8, "patch_size": 4, "in_channels": 1, "num_classes": 5}
    model = models.create("vit_nano", operator, embed_dim=8, depth=depth, num_heads=2, **sizes)
    source = torch.Generator().manual_seed(0)
    # larger than they are drawn, so that the operators show in the logits
    params = tree.map(
        lambda x: x + 0.3 * torch.randn(x.shape, generator=source), model.init(source)
    )
    export.write(tmp_path / "m.onnx", model, params, {}, "onnx")
    images = torch.randn(3, 1, 8, 8, generator=source)
    with torch.no_grad():
        logits = model.apply(params, images)
    assert logits.std() > 0.1
    for count in (1, 3):
        found = session(tmp_path / "m.onnx", images[:count])
        assert_close(found, logits[:count], rtol=1e-5, atol=1e-5)


def test_features_of_ones_own_bring_their_constants(tmp_path, session):
    centres = torch.tensor([-1.0, 0.0, 2.0])
    bumps = bases.linear(lambda x: (-((x[..., None] - centres) ** 2)).exp(), 3, family="bumps")
    sizes = {"image_size": 8, "patch_size": 4, "in_channels": 1, "num_classes": 5}
    own = operators.low_rank(bumps, rank=2)
    model = models.create("vit_nano", own, embed_dim=8, depth=1, num_heads=2, **sizes)
    params = model.init(torch.Generator().manual_seed(0))
    export.write(tmp_path / "m.onnx", model, params, {}, "onnx")
    images = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    found = session(tmp_path / "m.onnx", images)
    assert_close(found, model.apply(params, images), rtol=0, atol=1e-5)
    # a file that nobody could make a model of
    with pytest.raises(ValueError, match="needs a model made of specs .* got operators 'low_rank'"):
        export.write(tmp_path / "m.safetensors", model, params, {}, "safetensors")
    assert not (tmp_path / "m.safetensors").exists()


@pytest.mark.parametrize("form", ["torch", "onnx"])
def test_an_operator_that_cannot_be_exported_is_one_line(form, tmp_path, session):
    def rows(scores, mask):
        # which of two functions it is hangs on the values
        return scores.softmax(-1) if scores.sum() > 0 else scores.sigmoid()

    odd = operators.from_rows("odd", rows)
    sizes = {"image_size": 8, "patch_size": 4, "in_channels": 1, "num_classes": 5}
    model = models.create("vit_nano", odd, embed_dim=8, depth=1, num_heads=2, **sizes)
    params = model.init(torch.Generator().manual_seed(0))
    path = tmp_path / f"m{export.SUFFIXES[form]}"
    with pytest.raises(ValueError, match=f"`export` cannot write 'odd' as {form}: torch") as error:
        export.write(path, model, params, {}, form)
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--out", "m.bin"], "ends in .safetensors"),
        (["--out", "no/where/m.safetensors"], "directory that exists"),
        (["--out", "m.safetensors", "--seed", "7"], "one of [0]"),
        (["--out", "m.safetensors", "--format", "jpeg"], "invalid choice"),
    ],
)
def test_mistakes_are_one_line(run, argv, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["export", str(run), *argv]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_nothing_but_an_earlier_export_is_replaced(run, tmp_path, capsys):
    home = tmp_path / "run"
    shutil.copytree(run, home)
    (tmp_path / "m.safetensors").write_text("of somebody")
    places = [home / "last.safetensors", home / "config.safetensors", tmp_path / "m.safetensors"]
    before = {path: path.read_bytes() for path in [*home.glob("*.*"), places[-1]]}
    for out in places:
        assert cli.main(["export", str(home), "--out", str(out)]) == 2
        assert "of something else" in capsys.readouterr().err
    assert before == {path: path.read_bytes() for path in [*home.glob("*.*"), places[-1]]}
    # again, in another form, and then of another run in the one beside which another would stay
    out = str(tmp_path / "own.safetensors")
    for _ in range(2):
        assert cli.main(["export", str(home), "--out", out]) == 0
    one = runs.only(home)
    export.write(out, one.model, one.params, {"run": "another"}, "safetensors")
    argv = ["export", str(home), "--out", str(tmp_path / "own.pt2"), "--format", "torch"]
    assert cli.main(argv) == 2
    assert "own.json' of something else" in capsys.readouterr().err
    # nor may the one of two forms that the JSON file names take it away from the other
    both = [tmp_path / f"both{suffix}" for suffix in (".safetensors", ".pt2")]
    for path, form in zip(both, ("safetensors", "torch"), strict=True):
        assert cli.main(["export", str(home), "--out", str(path), "--format", form]) == 0
    with pytest.raises(ValueError, match="both.json' of something else"):
        export.write(both[1], one.model, one.params, {"run": "another"}, "torch")
    both[0].unlink()
    export.write(both[1], one.model, one.params, {"run": "another"}, "torch")


def test_predictions_are_those_of_the_run_on_its_own_pixels(run, expected, tmp_path, capsys):
    dataset = data.load("digits", "val")
    names = []
    for i in range(5):
        path = tmp_path / f"{i}.png"
        image = Image.fromarray(dataset.images[i, 0])
        # colour and an opaque alpha change nothing of a grey image
        image.convert(["L", "RGB", "RGBA", "LA", "L"][i]).save(path)
        names.append(str(path))
    capsys.readouterr()
    assert cli.main(["predict", str(run), *names, "--top", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()[2:]
    shares = expected[1].softmax(-1)
    for line, share in zip(lines, shares, strict=True):
        best = share.topk(2)
        wanted = [f"{int(i)} {100 * float(p):.1f} %" for p, i in zip(*best, strict=True)]
        assert line.split("  ", 1)[1].split() == " ".join(wanted).split()


def test_the_json_beside_a_file_says_how_to_predict_without_kart(tmp_path, capsys):
    home, path = tmp_path / "run", tmp_path / "photograph.png"
    more = ["--image-size", "12", "--eval-crop", "0.75", "--out", str(home)]
    assert cli.main(["train", "--operator", "G2B", *FLAGS, *more]) == 0
    pixels = np.random.default_rng(0).integers(0, 256, (100, 100), np.uint8)
    Image.fromarray(pixels).save(path)
    write_to = tmp_path / "m.pt2"
    assert cli.main(["export", str(home), "--format", "torch", "--out", str(write_to)]) == 0
    about = json.loads(write_to.with_suffix(".json").read_text())
    capsys.readouterr()
    assert cli.main(["predict", str(home), str(path), "--top", "10"]) == 0
    words = capsys.readouterr().out.splitlines()[-1].split()[1:]
    told = {name: float(share) for name, share in zip(words[::3], words[1::3], strict=True)}
    # Pillow, torch and the file
    side, size = about["image"][1], about["image_size"]
    image = Image.open(path).resize((side, side), Image.Resampling.BICUBIC)
    x = torch.from_numpy(np.asarray(image).astype(np.float32))[None, None] / 255
    scaled = int(size / about["eval_crop"])
    x = torch.nn.functional.interpolate(x, size=(scaled, scaled), mode="bilinear")
    start = (scaled - size) // 2
    x = x[..., start : start + size, start : start + size]
    x = (x - about["mean"][0]) / about["std"][0]
    shares = torch.export.load(write_to).module()(x)[0].softmax(-1)
    for name, share in zip(about["classes"], shares.tolist(), strict=True):
        assert abs(told[name] - 100 * share) < 0.051


def test_many_images_are_predicted_some_at_a_time(run, tmp_path, capsys, monkeypatch):
    names = [str(tmp_path / f"{i}.png") for i in range(5)]
    for i, name in enumerate(names):
        Image.new("RGB" if i % 2 else "L", (8, 8), 40 * i).save(name)
    assert cli.main(["predict", str(run), *names]) == 0
    at_once = capsys.readouterr()
    sizes, read = [], data.read_images
    monkeypatch.setattr(predict, "BATCH", 2)
    monkeypatch.setattr(
        data, "read_images", lambda names, shape: [sizes.append(len(names)), read(names, shape)][1]
    )
    assert cli.main(["predict", str(run), *names]) == 0
    assert capsys.readouterr() == at_once and sizes == [2, 2, 1]
    assert at_once.err == "converted: 2 colour to grey by luminance\n"


@pytest.mark.parametrize("paths", ["image.png", []])
def test_images_to_read_are_a_list(paths):
    with pytest.raises(ValueError, match="`read_images` needs a list of one path or more"):
        data.read_images(paths, (1, 8, 8))


def test_transparent_ground_is_white(run, tmp_path, capsys):
    clear = np.zeros((8, 8, 4), np.uint8)
    Image.fromarray(clear).save(tmp_path / "clear.png")
    Image.fromarray(np.full((16, 16), 255, np.uint8)).save(tmp_path / "white.png")
    argv = ["predict", str(run), str(tmp_path / "clear.png"), str(tmp_path / "white.png")]
    assert cli.main(argv) == 0
    printed = capsys.readouterr()
    one, two = (line.split()[1:] for line in printed.out.splitlines()[-2:])
    assert one == two
    # what was changed in them is named and counted
    assert printed.err.startswith("converted: ")
    for changed in ("1 resized to 8 x 8, the middle square", "1 transparency composited on white"):
        assert changed in printed.err
    (tmp_path / "text.png").write_text("no image")
    assert cli.main([*argv, "--top", "11"]) == 2
    assert "`--top` needs at most the 10 classes, got 11" in capsys.readouterr().err
    assert cli.main(["predict", str(run), str(tmp_path / "missing.png")]) == 2
    assert "missing.png': No such file or directory. Check the path" in capsys.readouterr().err
    assert cli.main(["predict", str(run), str(tmp_path / "text.png")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_leaves_whose_names_would_be_one_buffer_are_refused():
    model = models.create("vit_nano", image_size=8, patch_size=4)
    with pytest.raises(ValueError, match="`export` needs names that differ .* two at 'a__b'"):
        export.Exported(model, {"a": {"b": torch.ones(1)}, "a__b": torch.zeros(1)})
