"""Transformer-XL: segments that read the hidden states of the past, with relative positions.

    h~ = [SG(memory), h],  q = h W_q,  k = h~ W_k,  v = h~ W_v
    score(i, j) = (q_i . k_j + q_i . r_{i-j} + u . k_j + w . r_{i-j}) / sqrt(head_dim),  r_t = W_r R_t

R is the sinusoid of the distance, sines then cosines; u and w are learned per head. Source: Dai et al. 2019, section
3.2 (recurrence) and 3.3 (positions); the paper calls w "v".

The memory holds hidden states, projected again at each use, so that W_k and W_v go on learning from it; gradients do
not pass a segment border (horizon 1), wherever calls are cut: inside the open segment the state keeps its graph, what
lies before is detached. Positions are relative, so RoPE is not applied.
"""
