"""Adaptive Span: every head learns how far back it attends, and its cost shrinks with its span.

    m(x) = clamp((ramp + z - x) / ramp, 0, 1),  z = max_span * z',  z' in [0, 1] learned, one per head
    a_ij = m(i - j) exp(s_ij) / sum over j of m(i - j) exp(s_ij),  s_ij = q_i . k_j / sqrt(head_dim)
    loss + penalty * (mean of z over the heads of a layer)

Source: Sukhbaatar et al. 2019, "Adaptive Attention Span in Transformers", section 2.2. With `dynamic` every token has
its own span z_t = max_span * sigmoid(w . x_t + b) (section 2.3). `persistent` adds learned keys and values that all
tokens attend to, in the same softmax (all-attention, Sukhbaatar et al. 2019, "Augmenting Self-attention with Persistent
Memory").

The paper starts at z' = 0, where every head sees `ramp` tokens, and trains with Adagrad and a small gradient clip.
After every optimizer step `after_step` clamps z' to [0, 1]. The paper excludes the current token
(`include_self=False`); then the first token of a document sees nothing but the persistent vectors. Shapes depend on
parameters only: heads are computed up to their spans and the cache is as long as the longest span, so a trained model
is as fast and small as its spans are short. Dynamic spans are always computed up to max_span. A state saved before
spans grew is padded with empty slots. RoPE is applied where the model uses it; the paper's own relative positions are
not included.
"""
