"""Reformer's attention: tokens see those that fall into the same bucket of a locality-sensitive hash.

    h(x) = argmax [x R; -x R],  R (head_dim, num_buckets / 2) Gaussian, one for each head and each of num_hashes rounds
    out_i = softmax over the keys j of the union of the rounds of q_i . k_j, v_j;  k_j = q_j / |q_j|

Source: Kitaev et al. 2020, "Reformer: The Efficient Transformer", section 2. Queries and keys are shared: the key
projection of the layer is left aside; with `shared_qk=False` (pretrained models) keys are hashed too and logits are
q . k / sqrt(head_dim). A token sees itself only where it sees nothing else. RoPE, where the model has it, acts before
the hash.
The paper's reversible layers and its code's axial positions are parts of models, not of this mixer.

Two ways to choose, in each round:

- "strict": token i sees the last 2 * bucket_size tokens j < i of its bucket (not causal: the nearest bucket_size on
  either side). A later token changes nothing, so decoding equals training. The default where causal.
- "sorted", the paper's: in each round, tokens sorted by bucket and cut into chunks of bucket_size that see themselves
  and the previous chunk (the first one sees the last). Buckets share chunks, so a later token changes which keys an
  earlier one sees, though no value of it reaches there: law 1 holds for values alone (`traits.causal` False,
  `value_causal` True), and what is decoded token by token is not what was trained: it does not stream. The default
  where not causal.

The state is a ring of 2 * bucket_size tokens for every bucket of every round and head: at the defaults with heads of 64
in fp32 smaller than a KV cache of as many kv heads from 16,641 tokens on (num_hashes * num_buckets * 2 * bucket_size
tokens, and 8 bytes a token for its position). Every forward returns one, so choose `num_buckets` no larger than needed:
it is a constant, never derived from an input; buckets of 2 * bucket_size tokens at the usual length lose nothing.

Rotations are drawn by a generator of their own, saved with the model, and drawn anew every `redraw_every` optimiser
steps in `after_step` (the paper: every step), which voids carried states: a state records the number of its draw.
"""
