"""Linear attention: a feature map phi of queries and keys replaces the softmax.

    o_i = phi(q_i) S_i / (phi(q_i) . z_i),   S_i = sum_j phi(k_j) v_j^T,   z_i = sum_j phi(k_j)

The sums run over the keys j that query i sees. phi is elu(x) + 1 (Katharopoulos et al. 2020, section 3.2) or DPFP
(Schlag et al. 2021, section 5.3). There is no factor head_dim ** -0.5. RoPE, where the model uses it, is applied before
the feature map. The state is S and z of every kv head, in fp64, so that no token is lost to rounding even after 10^8
tokens. At any length it takes as much memory as 2 (head_dim + 1) cached fp32 keys per kv head (with elu features).
"""
