"""Reproduces the weights: prepare a cache, fit the two networks, export them."""
