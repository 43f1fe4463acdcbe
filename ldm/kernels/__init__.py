"""GPU kernels written in Triton, each in place of many that PyTorch would start. Its modules need Triton to import."""
