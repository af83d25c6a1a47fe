"""Compress Mixture-of-Experts language models in JAX."""
