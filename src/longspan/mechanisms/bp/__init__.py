"""BP-Transformer: near tokens one by one, far ones as spans of a binary tree, the coarser the farther.

    span (l, m):  key = sum_j w_j k_j,  value = sum_j w_j v_j,  w = softmax_j(u_l . k_j / sqrt(head_dim)),
                  over the 2^l tokens j of m 2^l .. (m + 1) 2^l - 1
    out_i = softmax over i itself and the k nearest spans of every level 0 .. max_level (level 0 are the tokens)
            of (q_i . key + q_i . e) / sqrt(head_dim), values;  e by side, level and how near the span is

The spans of a token do not overlap: every earlier token lies in exactly one, whatever the length, as far as the highest
level reaches: at least (2 k - 1) 2^max_level - k tokens, at most k (2^(max_level + 1) - 1). Where the next level could
not begin at a border of its own, the first of its k is half a span. Positions count from the start of the document.
Source: Ye et al. 2019, "BP-Transformer: Modelling Long-Range Context via Binary Partitioning", sections 3.1 (the graph)
and 3.2 (the attention). Bidirectional, the same on the right, and spans at the end of a text may be short.

The paper keeps spans through the layers: each attends to its tokens from a state of its own, which begins as zero, so
that in the first layer it is their mean. Here every layer makes its spans anew, with one learned query a level, which
begins as zero likewise. So a span that is still open is a running softmax sum, and a state is as long as the levels are
many. The paper's form stands in `definition`. RoPE where the model has it, in the scores: a span's key is
the mean of keys turned to their positions, so its score is the mean of theirs.
"""
