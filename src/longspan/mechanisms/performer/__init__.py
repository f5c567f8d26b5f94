"""Performer (FAVOR+): estimates softmax attention with positive orthogonal random features (Choromanski et al. 2021).

    o_i = sum_j phi(q_i) . phi(k_j) v_j / sum_j phi(q_i) . phi(k_j),   E phi(x) . phi(y) = exp(x . y)

`performer/operation.py` lists the kinds of features with their formulas. One random orthogonal projection serves all
heads, queries and keys (with two different ones nothing would be estimated). It is drawn with its own generator, saved
with the model, and redrawn every `redraw_every` optimizer steps in `after_step`. A redraw invalidates carried states,
so each state records the number of the projection it was made with. Evaluation draws no random numbers. RoPE, where
the model uses it, is applied before the feature map.

The estimate is good where |q|^2 / sqrt(head_dim) is small. At unit variance no practical number of features comes close
to softmax attention, but the mechanism trains.
"""
