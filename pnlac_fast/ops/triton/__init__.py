"""The operations as Triton kernels, for CUDA; with TRITON_INTERPRET=1 they run on the CPU, very slowly, for tests."""
