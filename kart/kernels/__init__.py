"""The streamed KArAt product: one entry, several engines, correct under every transform."""

from kart.kernels.core import ENGINES, contract, engines
from kart.kernels.plain import contract_units, mix_values, softmax_attention

__all__ = ["ENGINES", "contract", "contract_units", "engines", "mix_values", "softmax_attention"]
