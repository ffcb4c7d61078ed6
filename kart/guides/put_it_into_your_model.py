"""Put it into your model.

# The operator alone

An operator stands where softmax stood. A spec string names it (`kart.operators.parse` says what it
may hold); its parameters are a dict of tensors, drawn for so many heads and so many keys:

>>> import torch
>>> from kart import operators, optim, tree
>>> operator = operators.parse("G3B:rank=4").operator
>>> params = operator.init(torch.Generator().manual_seed(0), 2, 17)  # 2 heads, 17 keys
>>> {name: tuple(leaf.shape) for name, leaf in tree.named(params).items()}
{'units.coefs': (2, 4, 17, 6), 'mix': (2, 17, 4)}

`attend` takes queries, keys and values `(..., heads, tokens, d)`, as
`torch.nn.functional.scaled_dot_product_attention` does, and never holds a matrix of weights;
`weights` builds it, for looking:

>>> q, k, v = torch.randn(3, 5, 2, 17, 8, generator=torch.Generator().manual_seed(1))
>>> operator.attend(params, q, k, v).shape
torch.Size([5, 2, 17, 8])
>>> scores = q @ k.mT / 8**0.5
>>> looked_at = operator.weights(params, scores) @ v
>>> torch.allclose(looked_at, operator.attend(params, q, k, v), atol=1e-5)
True

A `mask` is boolean, True where a query may attend. A masked key has weight 0 and no part in the
weights of the others.

# Training it

Functions are pure: gradients come from `torch.func`, or from autograd if you set
`requires_grad_()` on the leaves, and any optimiser can hold them.

>>> def loss(params):
...     return (operator.attend(params, q, k, v) - v).square().mean()
>>> optimizer = optim.adamw(learning_rate=1e-2)
>>> state, first = optimizer.init(params), loss(params)
>>> for _ in range(20):
...     updates, state = optimizer.update(torch.func.grad(loss)(params), state, params)
...     params = optim.apply_updates(params, updates)
>>> bool(loss(params) < first)
True

# In a module of yours

A `torch.nn.Module` keeps the leaves as parameters and hands them over as they are named:

>>> class Attention(torch.nn.Module):
...     def __init__(self, dim, heads, tokens, spec="G3B"):
...         super().__init__()
...         self.heads, self.operator = heads, operators.parse(spec).operator
...         own = self.operator.init(torch.Generator().manual_seed(0), heads, tokens)
...         self.leaves = torch.nn.ParameterList(tree.leaves(own))
...         self.template = own
...         self.qkv = torch.nn.Linear(dim, 3 * dim)
...         self.out = torch.nn.Linear(dim, dim)
...
...     def forward(self, x):  # (B, N, dim)
...         leaves = iter(self.leaves)
...         params = tree.map(lambda _: next(leaves), self.template)
...         q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
...         mixed = self.operator.attend(params, q, k, v)
...         return self.out(mixed.transpose(1, 2).flatten(2))
>>> Attention(16, 2, 17)(torch.zeros(3, 17, 16)).shape
torch.Size([3, 17, 16])

# From softmax to a learned operator, without a jump

With `base=softmax` and `mix=zero` the operator is softmax before the first step, so that trained
weights stay good; learning begins from there:

>>> grown = operators.parse("G3B:base=softmax,mix=zero").operator
>>> start = grown.init(torch.Generator().manual_seed(0), 2, 17)
>>> torch.allclose(grown.weights(start, scores), scores.softmax(-1))
True

Another number of tokens: `kart.operators.resize`. A whole vision transformer: `kart.models.create`.
What it costs: `kart info --model vit_tiny --operator G3B`.
"""
