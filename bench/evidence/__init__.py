"""The parts of ``python bench/gpu.py``: what a machine with a GPU is asked, each in a process of its own."""
