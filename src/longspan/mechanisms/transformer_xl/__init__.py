"""Transformer-XL: segments attend to the hidden states of earlier segments, with relative positions.

    h~ = [SG(memory), h],  q = h W_q,  k = h~ W_k,  v = h~ W_v
    score(i, j) = (q_i . k_j + q_i . r_{i-j} + u . k_j + w . r_{i-j}) / sqrt(head_dim),  r_t = W_r R_t

R_t is the sinusoid of distance t, sines then cosines; u and w are learned per head; SG stops gradients.
Source: Dai et al. 2019, section 3.2 (recurrence) and 3.3 (positions); the paper calls w "v".

The memory holds hidden states that are projected again at each use, so that W_k and W_v keep learning from it.
Gradients do not cross a segment boundary (horizon 1), however the text is split into calls: inside the incomplete
segment the state keeps its graph, everything before it is detached. Positions are relative, so RoPE is not applied.
"""
