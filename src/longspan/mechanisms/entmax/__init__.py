"""Adaptively sparse attention: alpha-entmax replaces the softmax, with a learned alpha per head.

    p_ij = [1 + (alpha - 1) (z_ij - t_i)]_+ ^ (1 / (alpha - 1)),   z_ij = q_i . k_j / sqrt(head_dim),   sum_j p_ij = 1

alpha = 1 is the softmax, alpha = 2 the sparsemax; above 1, keys with low scores get weight exactly zero. Sources:
Correia et al. 2019, "Adaptively Sparse Transformers", section 3; Peters et al. 2019 for alpha-entmax. RoPE is applied
where the model uses it.

The paper keeps alpha in (1, 2) by a sigmoid. Here the parameter is alpha - 1 itself, clamped to [0, 1] after each
optimizer step: a head can become exactly the softmax or the sparsemax and leave it again, and low precision resolves
alpha best where it matters, near 1. Time is quadratic in the length, as in full attention, and memory linear; a window
bounds both.
"""
