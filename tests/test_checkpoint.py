"""Checkpoints: what goes in comes out bit for bit, and a failed save leaves the old file."""

import dataclasses
import json
import os
import subprocess
import sys
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import safetensors.torch
import torch
from torch.testing import assert_close

from kart import checkpoint, optim, tree


@dataclasses.dataclass(frozen=True)
class Config:
    embed_dim: int = 4
    span: tuple = (-4.0, 4.0)
    operator: str = "G3B"


def example():
    base = torch.arange(12.0).reshape(3, 4)
    return {
        "weight": base,
        "transposed": base.mT,
        "shared": base[1],
        "nothing": {},
        "blocks": {"0": {"empty": {"deeper": {}}, "bias": torch.tensor([0.0, -0.0, torch.nan])}},
        "half": torch.randn(5, generator=torch.Generator().manual_seed(0)).bfloat16(),
        "count": torch.tensor(2**62 + 1),
        "scalar": torch.tensor(1.5, dtype=torch.float64),
        "flags": torch.tensor([True, False]),
        "no_entries": torch.zeros(0, 3),
        "row": [torch.ones(1), (torch.zeros(2), [])],
        "expanded": torch.ones(1).expand(3),
        "trained": torch.nn.Parameter(torch.ones(2)),
        "conjugate": torch.tensor([1 + 2j, 3 - 1j]).conj(),
        "negated": torch._neg_view(torch.ones(2)),
    }


def equal_bits(a, b):
    def same(x, y):
        assert (x.dtype, x.shape, x.device) == (y.dtype, y.shape, y.device)
        if x.numel():
            x, y = (z.detach().resolve_conj().resolve_neg().contiguous() for z in (x, y))
            assert torch.equal(*(z.flatten().view(torch.uint8) for z in (x, y)))

    tree.map(same, a, b)


def test_params_and_config_come_back_bit_for_bit(tmp_path):
    path, params = tmp_path / "a.safetensors", example()
    checkpoint.save(path, params, Config())
    found, config = checkpoint.load(path)
    equal_bits(found, params)
    assert found["nothing"] == {} and found["blocks"]["0"]["empty"] == {"deeper": {}}
    assert isinstance(found["row"], list) and isinstance(found["row"][1], tuple)
    assert list(found) == list(params)
    assert config == {"embed_dim": 4, "span": [-4.0, 4.0], "operator": "G3B"}
    assert not any(leaf.requires_grad for leaf in tree.leaves(found))
    assert os.listdir(tmp_path) == ["a.safetensors"]


def test_an_optimiser_state_comes_back_onto_its_template(tmp_path):
    path, params = tmp_path / "a.safetensors", {"x": torch.ones(2, 3), "b": {"y": torch.ones(3)}}
    optimiser = optim.adamw(optim.warmup_cosine(0.1, 2, 9), max_norm=1.0)
    state = optimiser.init(params)
    _, state = optimiser.update(params, state, params)
    ema = optim.ema(0.9).init(params)
    rng = torch.Generator().manual_seed(3).get_state()
    checkpoint.save(path, params, {}, optimiser=state, ema=ema, rng=rng)

    found = checkpoint.load_state(path, optimiser=optimiser.init(params), rng=torch.empty_like(rng))
    assert list(found) == ["optimiser", "rng"]
    equal_bits(found["optimiser"], state)
    equal_bits(found["rng"], rng)
    assert isinstance(found["optimiser"][1], optim.AdamState)
    equal_bits(checkpoint.load_state(path, params=params)["params"], params)
    blank = tree.to(ema, "meta")
    equal_bits(checkpoint.load_state(path, ema=blank)["ema"], ema)


def test_any_safetensors_reader_sees_dotted_names_and_one_json(tmp_path):
    path = tmp_path / "a.safetensors"
    checkpoint.save(path, {"blocks": {"0": {"w": torch.ones(2)}}}, {"depth": 1}, more=torch.ones(1))
    assert sorted(safetensors.torch.load_file(path)) == ["more", "params.blocks.0.w"]
    with safetensors.safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["kart"])
    assert header["format"] == 2 and header["torch"] == torch.__version__
    said = checkpoint.describe(path)
    for name in ("digests", "seal"):
        del header[name]
    assert said == header | {"trees": ["more", "params"]}
    assert said["config"] == {"depth": 1}


def test_equal_content_gives_equal_files(tmp_path):
    files = [tmp_path / name for name in ("a", "b")]
    for path in files:
        checkpoint.save(path, example(), Config())
    assert files[0].read_bytes() == files[1].read_bytes()


def test_what_was_loaded_does_not_change_with_the_file(tmp_path):
    path = tmp_path / "a"
    checkpoint.save(path, {"x": torch.ones(1000)}, {})
    params, _ = checkpoint.load(path)
    path.write_bytes(b"\0" * path.stat().st_size)
    assert (params["x"] == 1).all()


def test_an_exception_while_saving_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    checkpoint.save(path, {"x": torch.ones(2)}, {"epoch": 1})

    def half(tensors, filename, metadata):
        filename.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", half)
    with pytest.raises(OSError, match="no space"):
        checkpoint.save(path, {"x": torch.zeros(2)}, {"epoch": 2})
    assert checkpoint.load(path)[1] == {"epoch": 1}
    assert os.listdir(tmp_path) == ["a.safetensors"]


KILLED = """
import os, signal, sys, torch
from kart import checkpoint
os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
checkpoint.save(sys.argv[1], {"x": torch.zeros(2)}, {"epoch": 2})
"""


def test_a_kill_while_saving_leaves_the_old_file_and_a_later_save_cleans_up(tmp_path):
    path = tmp_path / "a[1].safetensors"
    checkpoint.save(path, {"x": torch.ones(2)}, {"epoch": 1})
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    killed = subprocess.run([sys.executable, "-c", KILLED, path], env=environment)
    assert killed.returncode < 0
    assert checkpoint.load(path)[1] == {"epoch": 1}
    (left,) = (p for p in tmp_path.iterdir() if p != path)
    checkpoint.save(path, {"x": torch.ones(2)}, {"epoch": 3})
    assert left.exists()  # as young as this it could be another process at work
    os.utime(left, (0, 0))
    checkpoint.save(path, {"x": torch.ones(2)}, {"epoch": 4})
    assert os.listdir(tmp_path) == [path.name]


def test_a_kill_while_safetensors_writes_leaves_nothing_that_is_not_cleaned_up(tmp_path):
    path = tmp_path / "a.safetensors"
    saving = (
        "import sys, torch; from kart import checkpoint; x = torch.zeros(2**24); print(flush=1)"
    )
    saving += "; checkpoint.save(sys.argv[1], {'x': x}, {})"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", saving, path]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        while not any(tmp_path.rglob("*")) and process.poll() is None:
            pass
        process.kill()
    for left in tmp_path.rglob("*"):
        os.utime(left, (0, 0))
    checkpoint.save(path, {"x": torch.ones(2)}, {"epoch": 1})
    assert os.listdir(tmp_path) == [path.name]


def test_who_may_read_a_file_is_told_by_the_umask(tmp_path):
    for mask, mode in ((0o022, 0o644), (0o027, 0o640)):
        before = os.umask(mask)
        try:
            checkpoint.save(tmp_path / "a.safetensors", {"x": torch.ones(2)}, {})
        finally:
            os.umask(before)
        assert (tmp_path / "a.safetensors").stat().st_mode & 0o777 == mode


def test_an_error_of_the_disk_is_an_oserror_with_the_file(tmp_path):
    program = """
import resource, signal, sys, torch
from kart import checkpoint
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
for call in (lambda: checkpoint.save("a.st", {"x": torch.zeros(1000)}, {}),
             lambda: checkpoint.write_text("a.json", " " * 2000)):
    try:
        call()
    except OSError as error:
        print(error)
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    wanted = [f"[Errno 27] File too large: '{name}'" for name in ("a.st", "a.json")]
    assert done.stdout.splitlines() == wanted, done.stderr
    assert os.listdir(tmp_path) == []


def foreign(path):
    safetensors.torch.save_file({"x": torch.ones(2)}, path)


def truncated(path):
    checkpoint.save(path, {"x": torch.ones(100)}, {})
    path.write_bytes(path.read_bytes()[:-7])


def cut_in_the_header(path):
    checkpoint.save(path, {"x": torch.ones(100)}, {})
    path.write_bytes(path.read_bytes()[:50])


def empty(path):
    path.touch()


def text(path):
    path.write_text("epoch,loss\n" * 100)


def newer(path):
    header = json.dumps({"format": 99, "kart": "9.9"})
    safetensors.torch.save_file({"x": torch.ones(2)}, path, {"kart": header})


def garbled(path):
    safetensors.torch.save_file({"x": torch.ones(2)}, path, {"kart": "{not json"})


def headless(path):
    safetensors.torch.save_file({"x": torch.ones(2)}, path, {"kart": '{"format": 1}'})


def robbed(path):
    checkpoint.save(path, {"x": torch.ones(2), "y": torch.ones(2)}, {})
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata()
    safetensors.torch.save_file({"params.x": torch.ones(2)}, path, metadata)


@pytest.mark.parametrize("read", [checkpoint.load, checkpoint.load_state])
@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda path: None, "got '.*a.safetensors', which is not there. Check the path"),
        (lambda path: path.mkdir(), "which is no file"),
        (foreign, "written by kart, got .* without kart's metadata.* `from_timm`"),
        (truncated, "a whole safetensors file"),
        (cut_in_the_header, "a whole safetensors file"),
        (empty, "a whole safetensors file"),
        (text, "a whole safetensors file"),
        (newer, "got format 99 .* by kart 9.9. Update kart"),
        (garbled, "which is damaged"),
        (headless, "which is damaged"),
        (robbed, "which is damaged: its metadata names other tensors"),
    ],
)
def test_a_file_that_is_no_checkpoint_is_refused(tmp_path, read, spoil, words):
    path = tmp_path / "a.safetensors"
    spoil(path)
    like = {"params": {"x": torch.ones(2), "y": torch.ones(2)}} if read != checkpoint.load else {}
    with pytest.raises(ValueError, match=f"`{read.__name__}` needs.*{words}"):
        read(path, **like)


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ({"a": torch.ones(2)}, "missing in the template: state.b.0"),
        ({"a": torch.ones(2), "b": [torch.ones(1)], "c": torch.ones(1)}, "in the file: state.c"),
        ({"a": torch.ones(3), "b": [torch.ones(1)]}, r"state.a \(2,\) float32 for \(3,\) float32"),
        ({"a": torch.ones(2).long(), "b": [torch.ones(1)]}, r"a \(2,\) float32 for \(2,\) int64"),
        ({"a": torch.ones(2), "b": (torch.ones(1),)}, "lists, tuples, dicts or NamedTuples in"),
        ({"a": torch.ones(2), "b": [torch.ones(1)], "c": {}}, "in other places"),
        ({"a": 1, "b": [torch.ones(1)]}, "`load_state` needs trees of tensors, got int at 'st"),
    ],
)
def test_a_template_that_does_not_fit_is_told_what_differs(tmp_path, template, words):
    path = tmp_path / "a"
    checkpoint.save(path, {}, {}, state={"a": torch.ones(2), "b": [torch.ones(1)]})
    with pytest.raises(ValueError, match=words):
        checkpoint.load_state(path, state=template)


def test_a_tree_the_file_lacks_is_refused(tmp_path):
    checkpoint.save(tmp_path / "a", {}, {}, ema=torch.ones(1))
    with pytest.raises(ValueError, match="got 'optimiser'. It holds params, ema"):
        checkpoint.load_state(tmp_path / "a", optimiser=torch.ones(1))


@pytest.mark.parametrize(
    ("params", "config", "words"),
    [
        ({"a": None}, {}, "needs trees of tensors, got NoneType at 'params.a'"),
        ({"a": [1.0]}, {}, "got float at 'params.a.0'. Make it a tensor"),
        ({1: torch.ones(1)}, {}, "needs strings as keys, got 1 in 'params'"),
        ({"a.b": torch.ones(1), "a": {"b": torch.ones(1)}}, {}, "got two at 'params.a.b'"),
        (optim.ClipState(torch.ones(())), {}, "got a NamedTuple"),
        ({"a": torch.ones(1, device="meta")}, {}, "needs dense tensors with data"),
        ({"a": torch.ones(1).to_sparse()}, {}, "needs dense tensors"),
        ({}, {"a": torch.ones(1)}, "needs a config of JSON values"),
        ({}, {"a": float("nan")}, "needs a config of JSON values"),
        ({}, {"a": [{1: 2}]}, "needs a config of JSON values.*the key 1 is no string"),
    ],
)
def test_what_cannot_be_saved_is_named_and_nothing_written(tmp_path, params, config, words):
    with pytest.raises(ValueError, match=words):
        checkpoint.save(tmp_path / "a", params, config)
    assert os.listdir(tmp_path) == []


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(ValueError, match="needs an existing directory, got '.*nowhere'"):
        checkpoint.save(tmp_path / "nowhere" / "a", {}, {})
    with pytest.raises(ValueError, match="needs a file name, got the directory"):
        checkpoint.save(tmp_path, {}, {})


class Model(NamedTuple):
    config: SimpleNamespace
    init: object


def vit(classes=3, size=16, patch=4, channels=3, operator=True, dim=6):
    """The skeleton of a vision transformer: names and shapes are all that counts here."""
    height, width = (size, size) if isinstance(size, int) else size
    tokens = (height // patch) * (width // patch) + 1

    def init(generator):
        def randn(*shape):
            return torch.randn(shape, generator=generator)

        block = {"attn": {"qkv": {"weight": randn(3 * dim, dim), "bias": randn(3 * dim)}}}
        units = {"coefs": randn(2, 4, tokens, 6)}
        extra = {"operator": {"units": units, "mix": randn(2, tokens, 4)}}
        return {
            "patch_embed": {"proj": {"weight": randn(dim, channels, patch, patch)}},
            "cls_token": randn(1, 1, dim),
            "pos_embed": randn(1, tokens, dim),
            "blocks": {"0": block | (extra if operator else {})},
            "head": {"weight": randn(classes, dim), "bias": randn(classes)},
        }

    return Model(SimpleNamespace(image_size=size, patch_size=patch), init)


def donor(**shape):
    return tree.named(vit(operator=False, **shape).init(torch.Generator().manual_seed(9)))


def test_a_donor_gives_all_but_the_operators():
    model, state_dict = vit(), donor()
    params = checkpoint.from_timm(model, state_dict)
    fresh = tree.named(model.init(torch.Generator().manual_seed(0)))
    for name, leaf in tree.named(params).items():
        assert torch.equal(leaf, fresh[name] if "operator" in name else state_dict[name])
        assert all(leaf.data_ptr() != x.data_ptr() for x in state_dict.values())
    other = checkpoint.from_timm(model, state_dict, generator=torch.Generator().manual_seed(1))
    assert not torch.equal(other["blocks"]["0"]["operator"]["mix"], fresh["blocks.0.operator.mix"])


def test_a_donor_in_half_precision_is_cast_and_one_of_kart_keeps_its_operators():
    half = checkpoint.from_timm(vit(), tree.to(donor(), torch.float16))
    assert {leaf.dtype for leaf in tree.leaves(half)} == {torch.float32}
    own = tree.named(vit().init(torch.Generator().manual_seed(5)))
    assert_close(tree.named(checkpoint.from_timm(vit(), own)), own)


@pytest.mark.parametrize("classes", [3, 1000])
def test_another_head_is_drawn_anew_only_on_request(classes):
    model, state_dict = vit(classes=3), donor(classes=classes)
    if classes == 1000:
        words = r"another shape head.weight \(1000, 6\) for \(3, 6\).*Pass strict_head=False"
        with pytest.raises(ValueError, match=words):
            checkpoint.from_timm(model, state_dict)
    params = checkpoint.from_timm(model, state_dict, strict_head=False)
    fresh = model.init(torch.Generator().manual_seed(0))["head"]["weight"]
    expected = state_dict["head.weight"] if classes == 3 else fresh
    assert torch.equal(params["head"]["weight"], expected)
    headless = {k: v for k, v in state_dict.items() if not k.startswith("head")}
    assert torch.equal(checkpoint.from_timm(model, headless, False)["head"]["weight"], fresh)
    with pytest.raises(ValueError, match="missing head.weight, head.bias"):
        checkpoint.from_timm(model, headless)


def test_positions_are_resized_on_request_and_the_class_tokens_kept():
    state_dict = donor(size=32)
    # one channel constant, one rising along the rows, one along the columns
    grid = torch.zeros(8, 8, 6)
    grid[..., 0] = 2.0
    grid[..., 1] = (torch.arange(8.0) + 0.5)[:, None] / 8
    grid[..., 2] = (torch.arange(8.0) + 0.5) / 8
    state_dict["pos_embed"][:, 1:] = grid.reshape(1, 64, 6)
    with pytest.raises(ValueError, match=r"pos_embed \(1, 65, 6\) for .*Pass resize=True"):
        checkpoint.from_timm(vit(size=(16, 24)), state_dict)
    params = checkpoint.from_timm(vit(size=(16, 24)), state_dict, resize=True)
    found = params["pos_embed"]
    assert torch.equal(found[:, 0], state_dict["pos_embed"][:, 0])
    resized = found[0, 1:].reshape(4, 6, 6)
    assert_close(resized[..., 0], torch.full((4, 6), 2.0))
    # bicubic keeps straight lines, away from the border
    rows, columns = (torch.arange(4.0) + 0.5) / 4, (torch.arange(6.0) + 0.5) / 6
    assert_close(resized[1:3, :, 1], rows[1:3, None].expand(2, 6), atol=0.01, rtol=0)
    assert_close(resized[:, 2:4, 2], columns[None, 2:4].expand(4, 2), atol=0.01, rtol=0)


@pytest.mark.parametrize(
    ("state_dict", "words"),
    [
        (donor(channels=1), "images of 1 channels, the model of 3: .*in_channels=1"),
        (donor(patch=8, size=32), "another shape patch_embed.proj.weight .* patch_size=8"),
        (donor(dim=8), r"blocks.0.attn.qkv.weight \(24, 8\) for \(18, 6\)"),
        (
            donor() | {"dist_token": torch.ones(1, 1, 6), "head_dist.weight": torch.ones(3, 6)},
            "unexpected dist_token, head_dist.weight. The donor is a distilled DeiT",
        ),
        (
            donor() | {"layers.0.blocks.1.attn_mask": torch.ones(1)},
            "unexpected layers.0.blocks.1.attn_mask. The donor is of the original Swin",
        ),
        (
            donor() | {"module.extra": torch.ones(1)},
            r"unexpected module.extra. Some names begin with a prefix \(module.extra\)",
        ),
        (donor() | {"norm.weight": torch.ones(6)}, "unexpected norm.weight"),
        # an operator of which a part is there is not drawn in part
        (donor() | {"blocks.0.operator.mix": torch.ones(2, 17, 4)}, "missing blocks.0.operator.un"),
        (
            tree.to(donor(), torch.int8),
            r"no floating-point numbers patch_embed.proj.weight \(torch.int8\)",
        ),
        (
            {name: leaf.to("meta") for name, leaf in donor().items()},
            r"no floating-point numbers patch_embed.proj.weight \(no data\)",
        ),
        (donor() | {"pos_embed": torch.ones(1, 12, 6)}, r"pos_embed \(1, 12, 6\) for \(1, 17, 6\)"),
        ({}, "missing patch_embed.proj.weight, cls_token"),
        ({"weights": donor()}, r"got dict under 'weights'. Pass the inner dict"),
        ({"model": donor() | {"step": 3}}, "got int under 'step'"),
        (
            {"state_dict": donor(), "state_dict_ema": donor()},
            "got state_dict, state_dict_ema. Pass",
        ),
        (torch.nn.Linear(2, 2), r"got Linear. Pass its `state_dict\(\)`"),
        ("vit.safetensors", "got str. Load it first"),
    ],
)
def test_a_donor_that_does_not_fit_is_told_all_that_differs(state_dict, words):
    with pytest.raises(ValueError, match=words):
        checkpoint.from_timm(vit(), state_dict)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "module._orig_mod."])
@pytest.mark.parametrize("wrapper", [None, "state_dict", "model", "model_ema"])
def test_wrappers_and_prefixes_of_trainers_are_known(prefix, wrapper):
    state_dict = donor()
    wrapped = {prefix + name: leaf for name, leaf in state_dict.items()}
    if wrapper is not None:
        wrapped = {wrapper: wrapped, "epoch": 3, "optimizer": {"state": {}}}
    found = checkpoint.from_timm(vit(), wrapped)
    assert_close(found, checkpoint.from_timm(vit(), state_dict))


def test_swapped_arguments_are_named():
    with pytest.raises(ValueError, match="needs the model first, got a dict first"):
        checkpoint.from_timm(donor(), vit())
    with pytest.raises(ValueError, match="needs a model of `kart.models.create`, got dict"):
        checkpoint.from_timm(donor(), donor())


def test_a_head_of_another_name_is_a_head_too():
    def swin(classes):
        def init(generator):
            weight = torch.randn(classes, 4, generator=generator)
            return {"norm": {"weight": torch.ones(4)}, "head": {"fc": {"weight": weight}}}

        return Model(SimpleNamespace(image_size=8, patch_size=4), init)

    state_dict = tree.named(swin(10).init(torch.Generator().manual_seed(1)))
    with pytest.raises(
        ValueError, match=r"head.fc.weight \(10, 4\) for \(3, 4\). Pass strict_head"
    ):
        checkpoint.from_timm(swin(3), state_dict)
    params = checkpoint.from_timm(swin(3), state_dict, strict_head=False)
    fresh = swin(3).init(torch.Generator().manual_seed(0))
    assert_close(params, fresh)
