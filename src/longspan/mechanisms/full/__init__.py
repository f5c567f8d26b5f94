"""Full attention: every visible key, a state that grows with the text. The yardstick of all other mechanisms.

    out_i = sum_j softmax_j(q_i . k_j / sqrt(head_dim)) v_j,  j <= i where causal

Source: Vaswani et al. 2017, "Attention Is All You Need", equation 1. RoPE where the model has it.
"""
