"""Rank-aware sparse products for decoding: y = W s(x) + A B^T (x - s(x)), reading only what the token needs.

reference.py says in plain torch what every operation computes; packing.py lays weights out, once; triton_gemv.py and
cpu.py compute; operations.py picks by device and registers with torch.library; bench.py measures.

Nothing here knows of models. This file imports nothing, so that it can be found without torch.
"""
