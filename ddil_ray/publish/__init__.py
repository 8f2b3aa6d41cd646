"""Giving an exported folder away: other precisions, ONNX, the hub."""
