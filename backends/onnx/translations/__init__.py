"""One translation of a ``mopt::`` operator to ONNX per file."""
