"""Kolmogorov-Arnold Attention: learnable attention as pure functions over parameter pytrees."""
