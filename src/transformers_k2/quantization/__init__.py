"""Quantised weights: the formats on disk (codecs/) and how transformers meets them (hf_quantizer.py)."""
