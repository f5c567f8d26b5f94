"""Routing Transformer: a token attends to the tokens of its cluster, found by online spherical k-means.

    cluster(x) = argmax_c x . mu_c,  mu (clusters, head_dim) of unit length, one set per head
    out_i = softmax over the keys j of i's cluster of q_i . k_j, v_j

Source: Roy et al. 2021, "Efficient Content-Based Sparse Attention with Routing Transformers", section 4. If causal,
keys are queries by default (`shared_qk`): k_j = q_j / |q_j|, logits q_i . k_j, and a token sees itself only if it sees
no other token, as in `lsh`. The paper normalizes its queries too, which fixes the temperature that is learned here.
With `shared_qk=False` (for pretrained models) keys are clustered too, logits are q . k / sqrt(head_dim), and a token
always sees itself. Clusters depend on content only: RoPE, where the model uses it, is applied after routing. The paper
gives half of its heads to local attention: use `mixed_heads` with `window` for these.

Two ways to select keys:

- "strict" (default where causal): token i sees the last `window` tokens j < i of its cluster. With separate keys it
sees itself and the last window - 1 tokens whose key is in the cluster of its query. Bidirectional: as many on either
side. A later token changes nothing, so decoding matches training.
- "balanced" (the paper's; default where bidirectional): every cluster takes the `window` tokens nearest to its
centroid, and these attend to each other in the order of their positions. A token taken by several clusters gets the
mean over those in which it sees a token. A token that no cluster takes, or that is the first in all of its clusters,
sees itself (the paper's code gives zeros). A later token may displace an earlier one, although its value never reaches
the earlier output: law 1 (causality) holds for values only (`traits.causal` False, `value_causal` True). Decoding token
by token would not match training, so this form does not stream.

The state is a ring buffer of `window` tokens per cluster and head: num_clusters * window tokens, plus 8 bytes per token
for its position. At the defaults, with heads of 64 in fp32, it is smaller than a KV cache with as many kv heads from
4,161 tokens on.

Learning: centroids get no gradient. In training each forward pass sums the routing vectors x (queries, and separate
keys, normalized to unit length) of every cluster. `after_step` adds these up over all processes into moving sums and
counts, and moves each centroid to the normalized mean:

    s <- decay s + sum of the step's members,  n <- decay n + their number,  mu = s / |s|

The first `after_step` instead replaces the random centroids: it runs k-means (seeded by k-means++) over a sample of the
step's vectors and sets s and n from the clusters found. This invalidates carried states; later moves do not, because a
token stays in the ring buffer it entered. A cluster whose n falls below `reseed` times the average is reseeded: it
restarts at a vector of the step's sample, drawn in proportion to 1 - cos to the nearest centroid (k-means++), with s =
mu n and n the average. This does not invalidate states either: the ring of a dead cluster holds few tokens, and newer
ones push them out. The auxiliary loss commitment * |x - mu_c(x)|^2, averaged over tokens and heads, is appended to
`aux_losses` and pulls queries and keys to their centroids.

Two deviations from the paper. It prints mu <- decay mu + (1 - decay) / 2 (sums of the members), a rate that grows with
the batch; its code keeps moving sums and counts, as here. And it uses decay = 0.999 without reseeding, for runs of 10^5
steps and more: `decay=0.999, reseed=0` gives that. Queries drift quickly at the beginning of training, and clusters
that lose their members then never recover. Measured: the vectors of 300 steps of a small model (3 layers, 2 routed
heads each, 16 clusters, 1,024 bytes per step), replayed with each rule. The table shows how many of the 16 clusters
have at least a tenth of the average size, averaged over heads and the last 100 steps (in brackets: the minimum; the
share of the largest cluster):

    decay            0.999            0.99             0.95             0.9              0.8
    reseed = 0       6.5 (2; 42 %)    7.4 (2; 40 %)    9.4 (4; 25 %)    9.7 (5; 26 %)    11.4 (6; 22 %)
    reseed = 0.1     7.9 (3; 37 %)   10.6 (6; 23 %)   15.2 (12; 17 %)  15.7 (14; 17 %)   15.9 (14; 17 %)
"""
