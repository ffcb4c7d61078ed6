"""KArAt inside models of other libraries: the real ones where they import, else their calls."""

import copy
import pickle
import sys
import types

import pytest
import safetensors.torch
import torch
from torch.testing import assert_close

from kart import nn
from kart.bridges import multihead, timm, transformers
from kart.bridges.multihead import MultiheadAttention

DIM, HEADS, TOKENS = 12, 3, 7


def source(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=1):
    return torch.randn(*shape, generator=source(seed))


# --- torch's MultiheadAttention -------------------------------------------------------------------


def pair(**options):
    """torch's module and ours with softmax and its weights."""
    torch_options = dict(options)
    torch.manual_seed(0)
    theirs = torch.nn.MultiheadAttention(DIM, HEADS, **torch_options)
    ours = MultiheadAttention(DIM, HEADS, **options, operator="softmax")
    for name, p in theirs.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(p)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def boolean(*shape):
    # row by row some key is seen: torch's softmax of nothing is NaN
    hidden = torch.rand(*shape, generator=source(3)) > 0.6
    hidden[..., 0] = False
    return hidden


def additive(mask):
    return torch.zeros(mask.shape).masked_fill(mask, float("-inf"))


CALLS = {
    "plain": {},
    "padding": {"key_padding_mask": boolean(2, TOKENS)},
    "padding as numbers": {"key_padding_mask": additive(boolean(2, TOKENS))},
    "mask": {"attn_mask": boolean(5, TOKENS)},
    "mask as numbers": {"attn_mask": additive(boolean(5, TOKENS))},
    "mask of every head": {"attn_mask": boolean(2 * HEADS, 5, TOKENS)},
    "both": {"attn_mask": boolean(5, TOKENS), "key_padding_mask": boolean(2, TOKENS)},
    "weights of heads": {"average_attn_weights": False},
    "no weights": {"need_weights": False},
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("batch_first", [True, False])
def test_multihead_with_softmax_is_torchs(call, batch_first):
    theirs, ours = pair(batch_first=batch_first)
    shape = (2, 5, DIM) if batch_first else (5, 2, DIM)
    q = normal(*shape)
    keys = (2, TOKENS, DIM) if batch_first else (TOKENS, 2, DIM)
    k, v = normal(*keys, seed=2), normal(*keys, seed=4)
    for got, expected in zip(
        ours(q, k, v, **CALLS[call]), theirs(q, k, v, **CALLS[call]), strict=True
    ):
        if expected is None:
            assert got is None
        else:
            assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{"kdim": 5, "vdim": 6}, {"bias": False}])
def test_multihead_with_other_weights_is_torchs(options):
    theirs, ours = pair(batch_first=True, **options)
    q = normal(2, 5, DIM)
    k, v = (normal(2, TOKENS, options.get(name, DIM), seed=5) for name in ("kdim", "vdim"))
    assert_close(ours(q, k, v)[0], theirs(q, k, v)[0], rtol=1e-4, atol=1e-5)


def test_multihead_without_a_batch_and_causal_is_torchs():
    theirs, ours = pair()
    x = normal(TOKENS, DIM)
    later = torch.ones(TOKENS, TOKENS, dtype=torch.bool).triu(1)
    expected = theirs(x, x, x, attn_mask=later, is_causal=True, need_weights=True)
    for got in (ours(x, x, x, attn_mask=later), ours(x, x, x, is_causal=True)):
        for one, other in zip(got, expected, strict=True):
            assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_a_graph_of_multihead_takes_any_batch():
    ours = MultiheadAttention(DIM, HEADS, tokens=5, operator="G2:rank=3", batch_first=True)
    x = torch.randn(2, 5, DIM)
    axes = ({0: torch.export.Dim("batch", min=2)},) * 3
    graph = torch.export.export(ours, (x, x.flip(0), x + 1), dynamic_shapes=axes).module()
    y = torch.randn(4, 5, DIM)
    torch.testing.assert_close(graph(y, y + 1, y), ours(y, y + 1, y))


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
def test_multihead_inside_torchs_encoder_is_not_passed_over():
    layer = torch.nn.TransformerEncoderLayer(DIM, HEADS, 16, dropout=0.0, batch_first=True)
    layer.self_attn = MultiheadAttention(
        DIM, HEADS, batch_first=True, operator="G3B:rank=3", tokens=TOKENS
    )
    model = torch.nn.TransformerEncoder(layer, 2)
    x = normal(2, TOKENS, DIM)
    model.train()
    expected = model(x)
    model.eval()
    with torch.no_grad():
        assert_close(model(x), expected)
        padding = torch.zeros(2, TOKENS, dtype=torch.bool)
        padding[:, 5:] = True
        seen = model(x, src_key_padding_mask=padding)
        changed = torch.where(padding[..., None], x + 1, x)
        other = model(changed, src_key_padding_mask=padding)
    assert_close(seen[:, :5], other[:, :5])
    assert (seen[:, :5] - expected[:, :5]).abs().max() > 1e-4


@pytest.mark.filterwarnings("ignore:.*nested")  # torch: a prototype
def test_multihead_put_into_an_encoder_says_how_it_is_evaluated():
    # torch makes nested tensors where the number of heads is even
    layer = torch.nn.TransformerEncoderLayer(DIM, 2, 16, dropout=0.0, batch_first=True)
    model = torch.nn.TransformerEncoder(layer, 1)
    ours = MultiheadAttention(DIM, 2, batch_first=True, operator="softmax")
    ours.load_state_dict(model.layers[0].self_attn.state_dict())
    x, padding = normal(2, TOKENS, DIM), torch.zeros(2, TOKENS, dtype=torch.bool)
    padding[:, 5:] = True
    expected = model.train()(x, src_key_padding_mask=padding)
    model.layers[0].self_attn = ours
    model.eval()
    with torch.no_grad():
        with pytest.raises(ValueError, match="got a nested one.* Set `use_nested_tensor = False`"):
            model(x, src_key_padding_mask=padding)
        model.use_nested_tensor = False
        found = model(x, src_key_padding_mask=padding)
    assert_close(found[:, :5], expected[:, :5])


def test_multihead_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match=r"`MultiheadAttention` needs `dropout` 0, got 0.1"):
        MultiheadAttention(DIM, HEADS, dropout=0.1, operator="softmax")
    with pytest.raises(ValueError, match=r"needs `add_zero_attn` False"):
        MultiheadAttention(DIM, HEADS, add_zero_attn=True, operator="softmax")
    with pytest.raises(ValueError, match=r"needs `num_heads` to divide `embed_dim`, got 5 and 12"):
        MultiheadAttention(DIM, 5, operator="softmax")
    ours = MultiheadAttention(DIM, HEADS, operator="softmax", batch_first=True)
    x = normal(2, TOKENS, DIM)
    with pytest.raises(ValueError, match=r"needs `attn_mask` of 0 and -inf .* got other numbers"):
        ours(x, x, x, attn_mask=torch.ones(TOKENS, TOKENS))
    with pytest.raises(ValueError, match=r"needs `key_padding_mask` of shape \(2, 7\), got \(7, 2"):
        ours(x, x, x, key_padding_mask=torch.zeros(TOKENS, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"needs `value` of width 12 .* got \(2, 7, 5\)"):
        ours(x, x, x[..., :5])
    with pytest.raises(ValueError, match=r"`attn_mask` boolean or of floating.*, got torch.uint8"):
        ours(x, x, x, attn_mask=torch.zeros(TOKENS, TOKENS, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"`key` in the dtype of its parameters, torch.float32, g"):
        ours(x, x.double(), x)
    with pytest.raises(ValueError, match=r"of as many samples, got \[2, 1, 1\]. See `batch_first`"):
        ours(x, x[:1], x[:1])
    with pytest.raises(ValueError, match="as tensors, got Tensor, NoneType, Tensor. Convert"):
        ours(x, None, x)
    with pytest.raises(ValueError, match="as tensors, got Tensor, Tensor, Tensor, list. Convert"):
        ours(x, x, x, attn_mask=[[True]])
    for name, value in (("num_heads", 2.0), ("embed_dim", 0), ("kdim", "3"), ("vdim", 0)):
        given = {"embed_dim": DIM, "num_heads": HEADS, name: value}
        with pytest.raises(ValueError, match=f"needs an integer `{name}` >= 1, got {value!r}"):
            MultiheadAttention(**given, operator="softmax")
    assert multihead.MultiheadAttention is MultiheadAttention


def test_multihead_is_kept_where_and_in_what_torch_keeps_its_own():
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            made = MultiheadAttention(DIM, HEADS, operator="G2B", tokens=TOKENS)
        ours = MultiheadAttention(DIM, HEADS, operator="G2B", tokens=TOKENS)
        x = torch.randn(TOKENS, 2, DIM)
        assert ours(x, x, x)[0].dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    assert {(p.device.type, p.dtype) for p in made.parameters()} == {("meta", torch.float64)}


# --- timm -----------------------------------------------------------------------------------------


def block(layer, **options):
    """A layer made as timm's `Block` makes one."""
    given = {
        "qkv_bias": True,
        "qk_norm": False,
        "scale_norm": False,
        "proj_bias": True,
        "attn_drop": 0.0,
        "proj_drop": 0.0,
        "norm_layer": torch.nn.LayerNorm,
        "device": None,
        "dtype": None,
    }
    return layer(DIM, num_heads=HEADS, **{**given, **options})


@pytest.mark.parametrize("options", [{}, {"qk_norm": True, "scale_norm": True}])
def test_a_layer_made_by_timms_call_is_attention_by_hand(options):
    layer = block(timm.attention("softmax"), **options)
    x = normal(2, TOKENS, DIM)
    q, k, v = (nn.split_heads(t, HEADS) for t in layer.qkv(x).chunk(3, -1))
    if options:
        q, k = (torch.nn.functional.layer_norm(t, (4,)) for t in (q, k))
    out = nn.merge_heads((q @ k.mT / 2).softmax(-1) @ v)
    out = torch.nn.functional.layer_norm(out, (DIM,)) if options else out
    assert_close(layer(x), layer.proj(out), rtol=1e-4, atol=1e-5)
    assert_close(layer(x, attn_mask=torch.zeros(TOKENS, TOKENS)), layer(x))
    lower = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()
    assert_close(layer(x, is_causal=True), layer(x, attn_mask=lower))
    assert_close(layer(x, is_causal=True), layer(x, attn_mask=additive(~lower)))
    first, cache = layer.step(x[:, :3])
    rest, _ = layer.step(x[:, 3:], cache)
    assert_close(torch.cat([first, rest], 1), layer(x, is_causal=True), rtol=1e-4, atol=1e-5)


def test_universal_blocks_hold_one_operator():
    x = normal(2, TOKENS, DIM)
    for spec, sharing, count in (
        ("G3U:rank=3", None, 1),
        ("G3:rank=3", "universal", 1),
        ("G3:rank=3", None, 2),
        ("G3B:rank=3", None, 2),
    ):
        layer = timm.attention(spec, TOKENS, sharing=sharing)
        one, two = block(layer), block(layer)
        assert len({id(one.operator), id(two.operator)}) == count
        assert not torch.equal(one.qkv.weight, two.qkv.weight)
        same = torch.equal(one.operator.mix, two.operator.mix)
        assert same == (count == 1)
        two(one(x)).sum().backward()
        assert one.operator.mix.grad is not None


def test_a_timm_layer_copies():
    layer, x = block(timm.attention("softmax")), normal(2, TOKENS, DIM)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert_close(twin(x), layer(x), rtol=0, atol=0)


def test_a_class_of_layers_pickles_as_models_of_timms_keep_it():
    made = timm.attention("G2B:rank=2", tokens=5, generator=torch.Generator().manual_seed(3))
    again = pickle.loads(pickle.dumps({"attn_layer": made}))["attn_layer"]
    one, other = (layer(8, num_heads=2) for layer in (made, again))
    assert_close(other.state_dict(), one.state_dict(), rtol=0, atol=0)
    assert copy.deepcopy(made) is made


def test_timm_bad_input_is_named():
    with pytest.raises(ValueError, match=r"`attention` needs one way of sharing, got 'G3B'"):
        timm.attention("G3B", TOKENS, sharing="universal")
    with pytest.raises(ValueError, match=r"`attention` needs `sharing` \"blockwise\" or"):
        timm.attention("G3", TOKENS, sharing="both")
    with pytest.raises(ValueError, match=r"`attention` needs `attn_drop` 0, got 0.2"):
        block(timm.attention("softmax"), attn_drop=0.2)
    with pytest.raises(ValueError, match=r"needs `tokens`, the number of keys, for"):
        block(timm.attention("G3B"))


def test_a_timm_model_trains_with_karat():
    real = pytest.importorskip("timm", reason="timm does not import")
    layer = timm.attention("G3U:rank=3", tokens=17)
    model = real.create_model(
        "vit_tiny_patch16_224", img_size=64, depth=2, num_classes=3, attn_layer=layer
    )
    names = [name for name, _ in model.named_parameters() if "operator" in name]
    assert names == ["blocks.0.attn.operator.mix", "blocks.0.attn.operator.units.coefs"]
    images, labels = normal(4, 3, 64, 64), torch.tensor([0, 1, 2, 0])
    descent = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(5):
        loss = torch.nn.functional.cross_entropy(model(images), labels)
        descent.zero_grad()
        loss.backward()
        descent.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    # softmax inside loads timm's weights and gives timm's logits
    theirs = real.create_model("vit_tiny_patch16_224", img_size=64, depth=2, num_classes=3)
    ours = real.create_model(
        "vit_tiny_patch16_224",
        img_size=64,
        depth=2,
        num_classes=3,
        attn_layer=timm.attention("softmax"),
    )
    ours.load_state_dict(theirs.state_dict())
    assert_close(ours.eval()(images), theirs.eval()(images), rtol=1e-4, atol=1e-5)


# --- transformers ---------------------------------------------------------------------------------


class Layer(torch.nn.Module):
    """An attention layer as those of transformers are: what `attach` and the interface look at."""

    def __init__(self, config, causal):
        super().__init__()
        self.config = config
        self.is_causal = causal
        self.scaling = 0.3
        self.q_proj = torch.nn.Linear(DIM, DIM)
        self.k_proj = torch.nn.Linear(DIM, 4 * config.num_key_value_heads)

    def forward(self, x, attention_mask=None, **given):
        q = nn.split_heads(self.q_proj(x), HEADS)
        k = nn.split_heads(self.k_proj(x), self.config.num_key_value_heads)
        given = {"dropout": 0.0, "scaling": self.scaling, "sliding_window": None, **given}
        out, weights = transformers.attention(self, q, k, k, attention_mask, **given)
        return out.reshape(*x.shape[:-1], -1), weights


def model_of(spec="softmax", causal=True, groups=1, tokens=None, called=None, **options):
    config = types.SimpleNamespace(num_attention_heads=HEADS, num_key_value_heads=groups)
    torch.manual_seed(0)
    model = torch.nn.ModuleDict({"a": Layer(config, causal), "b": Layer(config, causal)})
    config._attn_implementation = called
    assert transformers.attach(model, spec, tokens, **options) == ["a", "b"]
    return model


@pytest.mark.parametrize("causal", [True, False])
def test_the_interface_with_softmax_is_attention_by_hand(causal):
    layer, x = model_of(causal=causal)["a"], normal(2, TOKENS, DIM)
    q, k = nn.split_heads(layer.q_proj(x), HEADS), nn.split_heads(layer.k_proj(x), 1)
    scores = 0.3 * q @ k.mT
    lower = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()
    seen = lower if causal else torch.ones_like(lower)
    expected = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    out, weights = layer(x, output_attentions=True)
    assert_close(weights, expected, rtol=1e-4, atol=1e-6)
    assert_close(out, nn.merge_heads(expected @ k), rtol=1e-4, atol=1e-5)
    assert layer(x)[1] is None
    # masks are boolean or added, and say everything
    mask = lower[None, None].expand(2, 1, -1, -1)
    least = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    for given in (mask, least):
        assert_close(layer(x, given)[0], model_of(causal=True)["a"](x)[0])
    # one more token after a cache sees all keys
    last = transformers.attention(layer, q[:, :, -1:], k, k, None, scaling=0.3)[0]
    full = transformers.attention(layer, q, k, k, None, scaling=0.3, is_causal=True)[0]
    assert_close(last, full[:, -1:])


def test_attach_gives_every_layer_its_own_or_one_operator():
    own = model_of("G3B:rank=3", tokens=TOKENS)
    assert not torch.equal(own["a"].kart_operator.mix, own["b"].kart_operator.mix)
    one = model_of("G3U:rank=3", tokens=TOKENS)
    assert one["a"].kart_operator is one["b"].kart_operator
    x = normal(2, TOKENS, DIM)
    one["b"](one["a"](x)[0])[0].sum().backward()
    assert one["a"].kart_operator.mix.grad.abs().max() > 0


def test_attach_replaces_no_operator_that_an_optimiser_may_hold():
    model = model_of("G3B:rank=3", tokens=TOKENS)
    held = model["a"].kart_operator.mix
    with pytest.raises(ValueError, match="layers without an operator, got 'a' with one, which an"):
        transformers.attach(model, "G3B:rank=3", TOKENS)
    assert model["a"].kart_operator.mix is held
    for layer in model.values():
        del layer.kart_operator
    assert transformers.attach(model, "softmax") == ["a", "b"]


def test_transformers_bad_input_is_named():
    layer, x = model_of()["a"], normal(2, TOKENS, DIM)
    with pytest.raises(ValueError, match=r"`attention` needs `dropout` 0, got 0.1"):
        layer(x, dropout=0.1)
    with pytest.raises(ValueError, match=r"needs a model without `softcap`"):
        layer(x, softcap=30.0)
    for name in ("s_aux", "sinks"):  # a column of logits beside those of the keys
        with pytest.raises(ValueError, match=f"needs a model without `{name}`"):
            layer(x, **{name: torch.zeros(2, HEADS, TOKENS, 1)})
    q, k = normal(2, HEADS, 2, 4), normal(2, HEADS, 5, 4)
    with pytest.raises(ValueError, match=r"needs a mask for 2 causal queries of 5 keys, got None"):
        transformers.attention(layer, q, k, k, None)
    del layer.kart_operator
    with pytest.raises(ValueError, match=r"got Layer without. Call `kart.bridges.transformers.att"):
        layer(x)
    with pytest.raises(ValueError, match=r"`attach` needs a model with attention layers"):
        transformers.attach(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("given", [torch.zeros(TOKENS, TOKENS), torch.zeros(2, 1, TOKENS, TOKENS)])
def test_a_learned_bias_is_refused_though_it_begins_at_zero(given):
    bias, x = torch.nn.Parameter(given), normal(2, TOKENS, DIM)
    needed = "that is not learned, got one that requires gradients. A bias of the scores"
    with pytest.raises(ValueError, match=f"`attention_mask` {needed}"):
        model_of()["a"](x, bias)
    bias.requires_grad_(False)
    assert_close(model_of(causal=False)["a"](x, bias)[0], model_of(causal=False)["a"](x)[0])
    if bias.dim() == 2:
        layer = MultiheadAttention(DIM, HEADS, operator="softmax", batch_first=True)
        with pytest.raises(ValueError, match=f"`attn_mask` {needed}"):
            layer(x, x, x, attn_mask=bias.requires_grad_())


def test_attach_refuses_layers_that_would_leave_the_operator_aside(monkeypatch):
    def theirs(*given, **options):
        raise AssertionError

    theirs.__module__ = "transformers.integrations.sdpa_attention"
    known = {"sdpa": theirs, "kart": transformers.attention, "mine": lambda *given: None}
    library = types.SimpleNamespace(AttentionInterface=lambda: known)
    monkeypatch.setitem(sys.modules, "transformers", library)
    for name in ("sdpa", "eager"):
        with pytest.raises(ValueError, match=rf"got 'a' with attn_implementation='{name}', which"):
            model_of(called=name)
    for name in ("kart", "mine"):
        model_of(called=name)


def test_a_cache_that_moves_keys_is_refused_where_places_count():
    q, k = normal(2, HEADS, 1, 4), normal(2, HEADS, 5, 4)
    full, room = (torch.ones(1, 1, 1, 5, dtype=torch.bool) for _ in range(2))
    room[..., 4:] = False

    def ask(spec, mask, **given):
        layer = model_of(spec, tokens=5)["a"]
        return transformers.attention(layer, q, k, k, mask, **given)[0]

    for spec in ("G1:order=generated", "G1", "2*softmax+G1:order=generated"):
        assert ask(spec, full).shape == ask(spec, room, sliding_window=6).shape
        with pytest.raises(ValueError, match="the places of keys, which a window of 5 moves"):
            ask(spec, full, sliding_window=5)
    assert ask("G1:order=by_distance", full, sliding_window=5).shape == (2, 1, HEADS, 4)
    with pytest.raises(ValueError, match="the last key, behind which a static cache has room"):
        ask("G1:order=by_distance", room)
    with pytest.raises(ValueError, match="the number of all tokens, which a cache does not know"):
        ask("cosformer", full)
    assert ask("cosformer", full, is_causal=False).shape == (2, 1, HEADS, 4)


def test_register_says_what_is_missing():
    try:
        import transformers as real  # noqa: F401
    except ImportError:
        with pytest.raises(ValueError, match=r"`register` needs transformers >= 4.53"):
            transformers.register()
    else:
        transformers.register("kart-test")


@pytest.fixture
def real():
    """The library, where it imports."""
    library = pytest.importorskip("transformers", reason="transformers does not import")
    transformers.register("kart")
    return library


def llama(real, spec, tokens=None):
    """A small causal language model with two heads of queries for each of keys."""
    torch.manual_seed(0)
    config = real.LlamaConfig(
        vocab_size=11,
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_implementation="kart" if spec else "sdpa",
    )
    model = real.LlamaForCausalLM(config).eval()
    if spec:
        names = [f"model.layers.{i}.self_attn" for i in range(2)]
        assert transformers.attach(model, spec, tokens) == names
    return model


IDS = torch.randint(11, (2, 9), generator=source())
LEFT_PADDED = torch.ones_like(IDS).index_put(
    (torch.zeros(3).long(), torch.arange(3)), IDS.new_tensor(0)
)


def test_a_transformers_model_trains_with_karat(real):
    model = llama(real, "G3B:rank=3", 9)
    descent = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(5):
        loss = model(input_ids=IDS, labels=IDS).loss
        descent.zero_grad()
        loss.backward()
        descent.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    changed = IDS.clone()
    changed[:, 6:] = (changed[:, 6:] + 1) % 11
    with torch.no_grad():
        assert_close(model(changed).logits[:, :6], model(IDS).logits[:, :6])


def test_softmax_in_a_transformers_model_is_its_own(real):
    theirs, ours = llama(real, None), llama(real, "softmax")
    ours.load_state_dict(theirs.state_dict())
    with torch.no_grad():
        assert_close(ours(IDS).logits, theirs(IDS).logits, rtol=1e-4, atol=1e-5)
        one, other = (m(IDS, attention_mask=LEFT_PADDED).logits for m in (ours, theirs))
        seen = LEFT_PADDED.bool()
        assert_close(one[seen], other[seen], rtol=1e-4, atol=1e-5)
        theirs.set_attn_implementation("eager")
        weights = [m(IDS, output_attentions=True).attentions for m in (ours, theirs)]
    for one, other in zip(*weights, strict=True):
        assert_close(one, other, rtol=1e-4, atol=1e-5)


SMALL = {"vocab_size": 11, "num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 24}
GROUPED = {**SMALL, "num_key_value_heads": 2, "intermediate_size": 32}
LAYERS = {"encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
HEADED = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "d_model": 24}
# what masks are made of: padding alone, causal, a window, windows and whole layers in turn, other
# keys than queries
KINDS = {
    "bert": {**SMALL, "intermediate_size": 32},
    "gpt2": {"vocab_size": 11, "n_embd": 24, "n_head": 4, "n_layer": 2},
    "mistral": {**GROUPED, "sliding_window": 3},
    "gemma3_text": {**GROUPED, "head_dim": 6, "sliding_window": 3},
    "bart": {"vocab_size": 11, **LAYERS, **HEADED},
}


@pytest.mark.parametrize("kind", KINDS)
def test_softmax_in_kinds_of_transformers_models_is_their_own(real, kind):
    models = []
    for name in ("eager", "kart"):
        config = real.AutoConfig.for_model(kind, **KINDS[kind], pad_token_id=0)
        torch.manual_seed(0)
        models.append(real.AutoModel.from_config(config, attn_implementation=name).eval())
    transformers.attach(models[1], "softmax")
    more = {"decoder_input_ids": IDS.flip(1)} if "decoder_layers" in KINDS[kind] else {}
    for mask in (None, torch.ones_like(IDS), LEFT_PADDED):
        with torch.no_grad():
            theirs, ours = (m(IDS, attention_mask=mask, **more)[0] for m in models)
        seen = LEFT_PADDED.bool() if mask is LEFT_PADDED and not more else torch.ones_like(IDS) > 0
        assert_close(ours[seen], theirs[seen], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mask", [None, LEFT_PADDED])
@pytest.mark.parametrize(
    "spec", ["softmax", "G3:order=elementwise,base=softmax", "G3:order=generated,reach=32"]
)
def test_generation_with_transformers_cache_is_the_full_pass(real, spec, mask):
    model = llama(real, spec)
    noise = source(5)
    with torch.no_grad():
        for leaf in model.parameters():  # what starts at zero has to say something
            leaf.add_(0.1 * torch.randn(leaf.shape, generator=noise))
    given = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "attention_mask": mask}
    cached, full = (
        model.generate(
            IDS, use_cache=use, output_logits=True, return_dict_in_generate=True, **given
        )
        for use in (True, False)
    )
    assert torch.equal(cached.sequences, full.sequences)
    for one, other in zip(cached.logits, full.logits, strict=True):
        assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("prompt", [1, 5])
@pytest.mark.parametrize("spec", ["softmax", "G3:rank=3"])
def test_generation_with_a_static_cache_is_the_full_pass(real, spec, prompt):
    tokens = 9 if spec != "softmax" else None
    model, ids = llama(real, spec, tokens), IDS[:, :prompt]
    given = {"max_new_tokens": 10 - prompt, "do_sample": False, "pad_token_id": 0}
    found = model.generate(ids, cache_implementation="static", **given)
    with torch.no_grad():
        for _ in range(10 - prompt):
            # those of later tokens are masked
            padded = torch.nn.functional.pad(ids, (0, 9 - ids.shape[1]))
            logits = model(padded, use_cache=False).logits[:, ids.shape[1] - 1]
            ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
    assert torch.equal(found, ids)


def test_a_model_of_transformers_without_sdpa_is_refused(real):
    # its encoder adds masks to scores, its decoder's layers are causal and do not say so
    config = real.BigBirdPegasusConfig(vocab_size=11, **LAYERS, **HEADED)
    model = real.BigBirdPegasusModel._from_config(config, attn_implementation="kart")
    with pytest.raises(ValueError, match=r"'decoder.layers.0.self_attn' in BigBirdPegasusDecoder,"):
        transformers.attach(model, "softmax")


def test_a_model_of_transformers_that_calls_its_own_attention_is_refused(real):
    sizes = {"image_size": 16, "patch_size": 4, "hidden_size": 12, "intermediate_size": 16}
    config = real.ViTConfig(**sizes, num_hidden_layers=1, num_attention_heads=HEADS)
    model = real.ViTModel(config)
    with pytest.raises(ValueError, match="with attn_implementation='sdpa', which would leave its"):
        transformers.attach(model, "softmax")
    model.set_attn_implementation("kart")
    assert transformers.attach(model, "softmax")
    with_bias = real.BeitConfig(
        **sizes,
        num_hidden_layers=1,
        num_attention_heads=HEADS,
        use_relative_position_bias=True,
        attn_implementation="kart",
    )
    model = real.BeitModel(with_bias)
    transformers.attach(model, "softmax")
    with pytest.raises(ValueError, match="`attention_mask` that is not learned"):
        model(normal(1, 3, 16, 16))


def test_a_vision_model_of_transformers_trains_shares_and_is_saved(real, tmp_path):
    def vit(impl):
        torch.manual_seed(0)
        sizes = {"image_size": 16, "patch_size": 4, "hidden_size": 24, "intermediate_size": 32}
        heads = {"num_hidden_layers": 2, "num_attention_heads": HEADS, "num_labels": 3}
        config = real.ViTConfig(**sizes, **heads, attn_implementation=impl)
        return real.ViTForImageClassification(config)

    images, labels = normal(4, 3, 16, 16), torch.tensor([0, 1, 2, 0])
    theirs, ours = vit("sdpa").eval(), vit("kart").eval()
    transformers.attach(ours, "softmax")
    ours.load_state_dict(theirs.state_dict())
    assert_close(ours(images).logits, theirs(images).logits, rtol=1e-4, atol=1e-5)

    model = vit("kart").train()
    transformers.attach(model, "G3U:rank=3", 17)
    descent = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model(pixel_values=images, labels=labels).loss
        descent.zero_grad()
        loss.backward()
        descent.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    again = vit("kart").eval()
    transformers.attach(again, "G3U:rank=3", 17)
    again.load_state_dict(model.state_dict())
    assert_close(again(images).logits, model.eval()(images).logits)
    model.save_pretrained(tmp_path)
    (path,) = tmp_path.glob("*.safetensors")
    found = safetensors.torch.load_file(path)
    assert sum(name.endswith("kart_operator.mix") for name in found) == 1


# --- as the README has them -----------------------------------------------------------------------

EXAMPLES = {
    "timm": """
import timm, torch
import kart

layer = kart.bridges.timm.attention("G3U", tokens=17)  # U: all blocks share one operator
model = timm.create_model("vit_tiny_patch16_224", img_size=64, num_classes=10, attn_layer=layer)
optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3)
images, labels = torch.randn(8, 3, 64, 64), torch.randint(10, (8,))
loss = torch.nn.functional.cross_entropy(model(images), labels)
loss.backward()
optimiser.step()
""",
    "transformers": """
import torch, transformers
import kart

kart.bridges.transformers.register("kart")
config = transformers.ViTConfig(image_size=64, num_labels=10, num_hidden_layers=2,
                                attention_probs_dropout_prob=0.0, attn_implementation="kart")
model = transformers.ViTForImageClassification(config)
kart.bridges.transformers.attach(model, "G3B", tokens=17)
optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3)
images, labels = torch.randn(8, 3, 64, 64), torch.randint(10, (8,))
loss = model(pixel_values=images, labels=labels).loss
loss.backward()
optimiser.step()
""",
    "hand": """
import torch
import kart

class Block(torch.nn.Module):
    def __init__(self, dim, heads, tokens, generator):
        super().__init__()
        self.norm, self.mlp = torch.nn.LayerNorm(dim), torch.nn.Linear(dim, dim)
        self.attn = kart.nn.Attention(dim, heads, tokens, operator="G3B", generator=generator)

    def forward(self, x):
        x = x + self.attn(self.norm(x), is_causal=True)
        return x + self.mlp(x).relu()

block = Block(64, 4, tokens=17, generator=torch.Generator().manual_seed(0))
block(torch.randn(2, 17, 64)).square().mean().backward()
""",
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_train_in_a_few_lines(name):
    if name != "hand":
        pytest.importorskip(name, reason=f"{name} does not import")
    lines = [line for line in EXAMPLES[name].splitlines() if line.strip()]
    assert len(lines) < 15
    found: dict = {}
    exec(compile(EXAMPLES[name], name, "exec"), found)
    model = found.get("model", found.get("block"))
    learned = [p for n, p in model.named_parameters() if n.endswith("units.coefs")]
    assert learned and all(p.grad is not None and p.grad.abs().max() > 0 for p in learned)
