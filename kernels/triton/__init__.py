"""Triton kernels, installed as `cnext.kernels`: one file per family of ops, each kernel with its launcher.

Which of the kernels an op takes is decided in `cnext.ops.dispatch`; CUDA and C++ kernels are in csrc/.
"""
