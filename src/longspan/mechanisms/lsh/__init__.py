"""Reformer (LSH attention): a token attends to tokens in the same bucket of a locality-sensitive hash.

    h(x) = argmax [x R; -x R],  R (head_dim, num_buckets / 2) Gaussian, one per head and per hash round
    out_i = softmax over the keys j of the union of the rounds of q_i . k_j, v_j;  k_j = q_j / |q_j|

Source: Kitaev et al. 2020, "Reformer: The Efficient Transformer", section 2. Queries and keys are shared: the layer has
no key projection. With `shared_qk=False` (for pretrained models) keys are hashed too and logits are q . k /
sqrt(head_dim). A token sees itself only if it sees no other token. RoPE, where the model uses it, is applied before
hashing. The paper's reversible layers and the axial positions of its code belong to models, not to this mixer.

Two ways to select keys in each hash round:

- "strict" (default where causal): token i sees the last 2 * bucket_size tokens j < i of its bucket (bidirectional: the
nearest bucket_size on either side). A later token changes nothing, so decoding matches training.
- "sorted" (the paper's; default where bidirectional): tokens are sorted by bucket and cut into chunks of bucket_size; a
chunk sees itself and the previous chunk (the first one sees the last). Buckets share chunks, so a later token changes
which keys an earlier one sees, although its value never reaches the earlier output: law 1 (causality) holds for values
only (`traits.causal` False, `value_causal` True). Decoding token by token would not match training, so this form does
not stream.

The state is a ring buffer of 2 * bucket_size tokens for every bucket, round and head: num_hashes * num_buckets * 2 *
bucket_size tokens plus 8 bytes per token for its position. At the defaults, with heads of 64 in fp32, it is smaller
than a KV cache with as many kv heads from 16,641 tokens on. Every forward pass returns one, so choose `num_buckets` no
larger than needed. It is a constant, never derived from the input; buckets that hold 2 * bucket_size tokens at the
usual length lose nothing.

Random rotations R are drawn with their own generator, saved with the model, and redrawn every `redraw_every` optimizer
steps in `after_step` (the paper: every step). A redraw invalidates carried states: a state records the number of its
rotations.
"""
