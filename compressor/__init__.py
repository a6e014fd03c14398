"""vitrim: a trained Vision Transformer in, the smallest, fastest *proven* model for one edge device out."""

__version__ = "0.1.0"
