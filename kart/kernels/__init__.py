"""The streamed KArAt product: one entry, several engines, correct under every transform."""

from kart.kernels.base import contract_softmax
from kart.kernels.core import ENGINES, contract, engines
from kart.kernels.entries import entry_attention
from kart.kernels.family import keep
from kart.kernels.mixed import factored_values
from kart.kernels.pairs import looked_up, pair_attention
from kart.kernels.plain import transforming
from kart.kernels.softmax import softmax_attention
from kart.kernels.stream import by_queries, contract_units, contract_values, mix_values

__all__ = [
    "ENGINES",
    "by_queries",
    "contract",
    "contract_softmax",
    "contract_units",
    "contract_values",
    "engines",
    "entry_attention",
    "factored_values",
    "keep",
    "looked_up",
    "mix_values",
    "pair_attention",
    "softmax_attention",
    "transforming",
]
