"""Routing Transformer: a token sees those of its cluster, found by an online spherical k-means of queries and keys.

    cluster(x) = argmax_c x . mu_c,  mu (clusters, head_dim) of length one, for each head
    out_i = softmax over the keys j of i's cluster of q_i . k_j, v_j

Source: Roy et al. 2021, "Efficient Content-Based Sparse Attention with Routing Transformers", section 4. Where causal,
keys are queries (`shared`), k_j = q_j / |q_j|, logits q_i . k_j, and a token sees itself only where it sees nothing
else, as in `lsh`; the paper scales its queries to one length too, which fixes the temperature that is learned here.
With `shared_qk=False` (pretrained models) keys are clustered too, logits are q . k / sqrt(head_dim), and a token always
sees itself. Clusters know content alone: RoPE, where the model has it, turns queries and keys behind the routing. The
paper gives half of its heads to local attention: `heads` with `window` parts.

Two ways to choose:

- "strict": token i sees the last `window` tokens j < i of its cluster (with separate keys itself and the last
  window - 1 whose key is in the cluster of its query; not causal: as many on either side). A later token changes
  nothing, so decoding equals training. The default where causal.
- "balanced", the paper's: every cluster takes the `window` tokens nearest to its centroid, which see each other in the
  order of their positions. A token taken by several clusters gets the mean over those in which it sees a token; a token
  that none takes, or that is the first of all its clusters, sees itself (the paper's code gives zeros). A later token
  may push an earlier one out, though no value of it reaches there: law 1 holds for values alone (`traits.causal`
  False, `value_causal` True), and what is decoded token by token is not what was trained: it does not stream. The
  default where not causal.

The state is a ring of `window` tokens for every cluster and head: at the defaults with heads of 64 in fp32 smaller
than a KV cache of as many kv heads from 4,161 tokens on (num_clusters * window tokens, and 8 bytes a token for its
position).

Learning: centroids get no gradient. In training each forward adds up the routing vectors x (queries, and separate keys,
scaled to length one) of every cluster; `after_step` sums them over all processes into moving sums and counts and puts
each centroid at their mean, back to length one:

    s <- decay s + sum of the step's members,  n <- decay n + their number,  mu = s / |s|

The first `after_step` instead sets the centroids, random until then, by k-means (seeded by k-means++) over a sample of
what the step has seen, and s and n to what these clusters had there; that voids carried states, later moves do not: a
token stays in the ring that it entered. A cluster whose n falls below `reseed` of an even share begins anew at a vector
of the step's sample, drawn in proportion to 1 - cos to the nearest centroid (k-means++), with s = mu n and n an even
share. Nor does that void states: the ring of a dead cluster holds few tokens, which newer ones push out.
`aux_losses` gets commitment * |x - mu_c(x)|^2, the mean over tokens and heads, which draws queries and keys to their
centroids.

Two deviations from the paper. It prints mu <- decay mu + (1 - decay) / 2 (sums of the members), whose rate grows with
the batch; its code keeps moving sums and counts, as here. And it takes decay = 0.999 and revives nothing, for runs of
10^5 steps and more: `decay=0.999, reseed=0` is that. Queries drift fast at the beginning of training, and clusters that
lose their members then never come back. The vectors of 300 steps of a small model (3 layers, 2 routed heads in each,
16 clusters, 1,024 bytes a step), read again by each rule, leave so many clusters with at least a tenth of an even
share, on average over heads and the last 100 steps (the least anywhere; share of the largest cluster):

    decay            0.999            0.99             0.95             0.9              0.8
    reseed = 0       6.5 (2; 42 %)    7.4 (2; 40 %)    9.4 (4; 25 %)    9.7 (5; 26 %)    11.4 (6; 22 %)
    reseed = 0.1     7.9 (3; 37 %)   10.6 (6; 23 %)   15.2 (12; 17 %)  15.7 (14; 17 %)   15.9 (14; 17 %)
"""
