"""Linear attention: a feature map of queries and keys in place of the softmax.

    o_i = phi(q_i) S_i / (phi(q_i) . z_i),   S_i = sum_j phi(k_j) v_j^T,   z_i = sum_j phi(k_j)

over the keys that i sees; phi is elu(x) + 1 (Katharopoulos et al. 2020, section 3.2) or DPFP (Schlag et al. 2021,
section 5.3). No factor head_dim ** -0.5. RoPE, where the model has it, acts before the feature map. The state is S and
z of every key head, in fp64, so that 10^8 tokens are summed like the first: as large as 2 (head_dim + 1) keys of elu
features in fp32, at any length.
"""
