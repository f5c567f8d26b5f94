"""Several mechanisms side by side, each on its own heads of one layer.

q, k and v are projected once and split over the cores by heads; their outputs are joined and projected back. So half
of a layer may look near and half far, as in Routing Transformer (Roy et al. 2021, section 4) and BigBird-like mixes.
"""
