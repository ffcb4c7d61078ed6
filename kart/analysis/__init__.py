"""Measurements of models and operators: tensors in, tensors out, each beside its plot."""
