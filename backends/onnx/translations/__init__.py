"""One translation of an operator that ONNX has no like of per file."""
