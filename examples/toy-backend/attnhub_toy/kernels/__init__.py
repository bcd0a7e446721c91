"""The kernels of the toy backend."""
