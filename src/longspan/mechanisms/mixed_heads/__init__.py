"""Several mechanisms side by side in one layer, each on its own heads.

q, k and v are projected once and split by heads over the mechanisms; their outputs are concatenated and projected back.
For example, half of the heads can attend locally and half globally, as in Routing Transformer (Roy et al. 2021, section
4) and BigBird-like mixtures.
"""
