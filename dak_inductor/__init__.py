"""A TorchInductor backend for models that do not fit in GPU memory."""
