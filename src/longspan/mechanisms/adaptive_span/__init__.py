"""Adaptive Span: every head learns how far it looks, and costs no more than that.

    m(x) = clamp((ramp + z - x) / ramp, 0, 1),  z = max_span * z',  z' in [0, 1] learned, one a head
    a_ij = m(i - j) exp(s_ij) / sum over j of m(i - j) exp(s_ij),  s_ij = q_i . k_j / sqrt(head_dim)
    loss + penalty * (mean of z over the heads of a layer)

Source: Sukhbaatar et al. 2019, "Adaptive Attention Span in Transformers", section 2.2. With `dynamic` every token has
its own z_t = max_span * sigmoid(w . x_t + b) (section 2.3). `persistent` adds learned keys and values that all tokens
see, in the same softmax (all-attention, Sukhbaatar et al. 2019, "Augmenting Self-attention with Persistent Memory").

The paper starts at z' = 0, where every head sees `ramp` tokens, with Adagrad and a small clip; after every optimiser
step `after_step` clamps z' to [0, 1]. The paper leaves the current token out (`include_self=False`); then the first
token of a document sees nothing but persistent vectors. Shapes depend on parameters alone: heads are trimmed to their
spans and the state to the longest of them, so a trained model is as fast and small as its spans are short; dynamic
spans are computed at max_span. A state from before spans grew is extended by empty slots. RoPE where the model has it;
the paper's own relative positions are not part of the mixer.
"""
