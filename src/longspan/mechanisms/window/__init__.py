"""Sliding-window attention, and a form in which the window is a pair of fixed blocks.

    sliding:  query i sees key j where 0 <= i - j < window          (bidirectional: |i - j| < window)
    blocks:   j <= i and i // window - j // window <= 1             (bidirectional: |i // window - j // window| <= 1)

With `sinks`, a query also sees the first `sinks` positions of its document, which come before what it sees above, in
the same softmax (Xiao et al. 2024, StreamingLLM, section 3.2).

Positions count from the start of the document, so block boundaries restart at every reset. RoPE is applied where the
model uses it. Sources: Child et al. 2019, section 4.2 (local factor); Beltagy et al. 2020 (Longformer), section 3.1;
the block form is the local attention of Reformer (Kitaev et al. 2020) and Routing Transformer (Roy et al. 2021).
"""
