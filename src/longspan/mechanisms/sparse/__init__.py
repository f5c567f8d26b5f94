"""Sparse Transformer: near keys and few of the far ones, so that two layers connect everything in O(n sqrt n).

    strided:  local    i - stride <= j <= i                summary  (i - j) % stride == 0
    fixed:    local    j // stride == i // stride          summary  j % stride >= stride - summary, or j = i
    out_i = softmax over the keys j <= i of the part (local, summary or their union) of q_i . k_j / sqrt(head_dim), v_j

Positions count from the start of the document. Source: Child et al. 2019, "Generating Long Sequences with Sparse
Transformers", section 4.3 (the sets) and 5.1 (three ways to join them): merged is `part="union"`; interleaved is one
`part` a layer, in turn, by the model's list of mixers; by head is `heads` with a `part` each. The paper leaves a fixed
summary layer with nothing to see at the first positions of a text; here a token always sees itself.

The strided form keeps every key and reads O(stride + n / stride) of them a step. The fixed form forgets: of a closed
block only its summary columns remain. On text the paper finds the fixed form right and the strided one wrong (its
section 7.1); strided is for what has a period, as images have rows. RoPE where the model has it.
"""
