"""Reverse mode on ONNX graphs: rules/ has one file per family of operators; reverse.py is the algorithm."""
