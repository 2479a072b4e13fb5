"""Triton kernels and their launchers: for GPUs without the compiled core, and through the interpreter on the CPU.

Nothing in here knows torch.library, autograd or the rest of fastpost.
"""
