"""Client of vsprefill: token ids or text in, KV cache and first token out."""

__version__ = "0.1.0"
