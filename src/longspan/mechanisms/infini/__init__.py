"""Infini-attention: causal attention inside segments, and a memory of constant size for all before (2404.07143).

Equations in `operation`. Segments are positions modulo `segment`; the memory is read before it is written,
and written when a segment closes, so inside an open segment decoding reads local keys. RoPE, where the model has it,
acts in the local part only. One gate per head, in fp32, in a parameter group of its own with a learning rate at which
it can move (with the usual one it never leaves one half) and no weight decay, which would pull it back. One memory per
kv head, in fp64, so that 10^8 tokens are summed like the first.
"""
