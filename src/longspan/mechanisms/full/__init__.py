"""Full (dense) softmax attention: every query attends to every visible key. The baseline for all other mechanisms.

    out_i = sum_j softmax_j(q_i . k_j / sqrt(head_dim)) v_j,  j <= i where causal

The KV cache grows by one key and one value per token. RoPE is applied where the model uses it. Source: Vaswani et al.
2017, "Attention Is All You Need", equation 1.
"""
