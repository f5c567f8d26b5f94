"""Performer: softmax attention by positive orthogonal random features, FAVOR+ (Choromanski et al. 2021).

    o_i = sum_j phi(q_i) . phi(k_j) v_j / sum_j phi(q_i) . phi(k_j),   E phi(x) . phi(y) = exp(x . y)

Kinds of features and their formulas are in `operation`. One projection for all heads, for queries and for keys
(with two of them nothing is estimated); orthogonal, drawn by a generator of its own, saved with the model, and drawn
anew every `redraw_every` optimiser steps in `after_step`, which voids carried states: a state records the number of
its draw. RoPE, where the model has it, acts before the feature map. Evaluation draws nothing.

The estimate is good where |q|^2 / sqrt(head_dim) is small: at unit variance no practical number of features is near
softmax attention, but the mechanism trains.
"""
