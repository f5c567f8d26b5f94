"""Sliding-window attention, and its block form.

    sliding:  key j is seen from i where 0 <= i - j < window        (bidirectional: |i - j| < window)
    blocks:   j <= i and i // window - j // window <= 1             (bidirectional: |i // window - j // window| <= 1)

Positions count from the start of the document, so blocks begin anew at every reset. Sources: Child et al. 2019,
section 4.2 (local factor); Beltagy et al. 2020 (Longformer), section 3.1; the block form is the local attention of
Reformer (Kitaev et al. 2020) and Routing Transformer (Roy et al. 2021). RoPE where the model has it.
"""
