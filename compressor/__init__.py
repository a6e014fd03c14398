"""vitrim: a trained Vision Transformer in, the smallest, fastest *proven* model for one edge device out."""

import os

__version__ = "0.1.0"

# ONNX Runtime 1.31 reports to its vendor from the moment it is imported, and leaves a file in the temporary folder. Nothing
# here talks to a network; every module of ours imports this one first, and processes that are started inherit it.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
