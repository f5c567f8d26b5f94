"""BP-Transformer: attends to near tokens one by one and to far tokens as spans of a binary tree, coarser with distance.

    span (l, m):  key = sum_j w_j k_j,  value = sum_j w_j v_j,  w = softmax_j(u_l . k_j / sqrt(head_dim)),
                  over the 2^l tokens j of m 2^l .. (m + 1) 2^l - 1
    out_i = softmax over i itself and the k nearest spans of every level 0 .. max_level (level 0: single tokens)
            of (q_i . key + q_i . e) / sqrt(head_dim), values;  e is learned, by side, level and rank of the span

The spans that a token sees do not overlap: every earlier token lies in exactly one of them, up to the reach of the
highest level, which is at least (2 k - 1) 2^max_level - k tokens and at most k (2^(max_level + 1) - 1). Where the spans
of the next level would not start at one of that level's boundaries, the first of its k is a span of half the size.
Positions count from the start of the document. A bidirectional instance sees the mirror image on the right; spans at
the end of a text may then be incomplete. Source: Ye et al. 2019, "BP-Transformer: Modelling Long-Range Context via
Binary Partitioning", sections 3.1 (the graph) and 3.2 (the attention).

In the paper, spans have hidden states that pass through the layers: each attends to its tokens from its own state,
which starts at zero, so in the first layer a span is the mean of its tokens. Here every layer computes its spans from
its own tokens, with one learned query per level, which also starts at zero. So an incomplete span is a running softmax
sum, and the state only needs a fixed number of spans per level. `bp/definition.py` has the paper's form. RoPE, where
the model uses it, is applied in the scores: a span's key is the mean of rotated keys, so its score is the mean of
theirs.
"""
