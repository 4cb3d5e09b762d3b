"""Rank-aware sparse products for decoding: y = W s(x) + A B^T (x - s(x)), reading only what the token needs.

reference.py says in plain torch what every operation computes; packing.py lays weights out, once, quantized.py holds
INT4 ones; triton_gemv.py (of triton_tiles.py, triton_lists.py and, for several tokens, triton_batch.py),
triton_neurons.py and cpu.py compute; operations.py picks by device and registers with torch.library; gathering.py
says for how many tokens rows are gathered; tuning.py chooses a launch, which folders.py has a place for; bench.py
measures, with shapes.py, inputs.py, timing.py, processors.py and destination.py. What lies between the products of a
decoder's block is in attention.py, by triton_attention.py. Nothing here knows of models. This file imports nothing,
so that it can be found without torch.
"""
