"""Infini-attention: causal attention inside segments plus a constant-size memory of all earlier segments (2404.07143).

A segment is a stretch of `segment` positions. The memory is read before the segment is written to it; a segment is
written when it is complete, so decoding inside an incomplete segment attends to local keys only. `infini/operation.py`
has the equations. RoPE, where the model uses it, is applied in the local attention only. One gate per head mixes both
parts, in fp32, in an optimizer group of its own: with a larger learning rate (with the usual one the gate never leaves
one half) and no weight decay (which would pull it back). There is one memory per kv head, in fp64, so that no token is
lost to rounding even after 10^8 tokens.
"""
