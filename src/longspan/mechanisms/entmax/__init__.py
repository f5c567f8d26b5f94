"""Adaptively sparse attention: alpha-entmax in place of the softmax, an alpha per head that is learned.

    p_ij = [1 + (alpha - 1) (z_ij - t_i)]_+ ^ (1 / (alpha - 1)),   z_ij = q_i . k_j / sqrt(head_dim),   sum_j p_ij = 1

alpha = 1 is the softmax, 2 the sparsemax; above 1 a head gives weight zero to keys that it scores low enough. Sources:
Correia et al. 2019, "Adaptively Sparse Transformers", section 3; Peters et al. 2019 for alpha-entmax. RoPE where the
model has it.

The paper keeps alpha in (1, 2) by a sigmoid. Here the parameter is alpha - 1 itself, clamped to [0, 1] after each
optimiser step: a head can become the softmax or the sparsemax exactly and leave it again, and low precision resolves
alpha best where it matters, near 1. Time is quadratic in the length, as of full attention, memory linear; with a window
both are bounded by it.
"""
