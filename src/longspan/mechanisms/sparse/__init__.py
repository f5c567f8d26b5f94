"""Sparse Transformer: each query sees near keys and a few far ones, so two layers connect all tokens in O(n sqrt n).

    strided:  local    i - stride <= j <= i                summary  (i - j) % stride == 0
    fixed:    local    j // stride == i // stride          summary  j % stride >= stride - summary, or j = i
    out_i = softmax over the keys j <= i of the part (local, summary or their union) of q_i . k_j / sqrt(head_dim), v_j

Positions count from the start of the document. Source: Child et al. 2019, "Generating Long Sequences with Sparse
Transformers", section 4.3 (the key sets) and 5.1 (three ways to combine them). Merged attention is `part="union"`;
interleaved attention is a different `part` in each layer, by the model's list of mixers; attention by head is the mixer
`mixed_heads` with a `part` each. In the paper, a fixed summary layer sees no key at the first positions of a text; here
a token always sees itself.

The strided form caches every key and reads O(stride + n / stride) of them per step. The fixed form discards: of a
complete block only its summary columns remain. For text the paper recommends the fixed form and advises against the
strided one (section 7.1); strided suits periodic data, such as the rows of an image. RoPE is applied where the model
uses it.
"""
