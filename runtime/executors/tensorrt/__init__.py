"""TensorRT and TensorRT-RTX through cuda-bindings, without torch."""
