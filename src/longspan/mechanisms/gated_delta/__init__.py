"""Gated DeltaNet (Yang, Kautz and Hatamizadeh 2024, arXiv 2412.06464): a recurrent memory that decays and overwrites.

Each kv head has a matrix S with key_dim rows and value_dim columns. At each token S first decays, then the value
currently stored under the token's key is removed, and the token's value is written there:

    S_t = a_t (I - b_t k_t k_t^T) S_{t-1} + b_t k_t v_t^T,    o_t = q_t S_t
    a_t = exp(-exp(A_log) softplus(W_a x_t + dt_bias)),       b_t = sigmoid(W_b x_t)

x is the layer's input, as its projections read it. q, k and v are projections of x, each followed by a causal depthwise
convolution over `conv_size` tokens and SiLU; q and k are then normalized to unit length. The output is RMSNorm(o_t)
SiLU(W_g x_t), with one norm of value_dim weights shared by all heads.

Design choices. Queries are not multiplied by key_dim ** -0.5: the paper's equations do not do it (the authors' kernels
do). The norm cancels any such factor, and without it the norm's eps stays small compared with o. With grouped queries,
the query heads of a group read the one state of their kv head; so decays a and write strengths b are per kv head, and
output gates per query head. RoPE is not applied, because the recurrence itself encodes order. A_log and dt_bias are
initialized as in the authors' code.

State per row, at any length: S of each kv head in fp32 (S decays instead of growing with the stream, so fp64 is not
needed) and the last conv_size - 1 columns of q, k and v. Cost per token and head: about (4 C + 3 value_dim) key_dim
multiply-adds in chunks of C = 64 tokens for value_dim = key_dim; only the states between chunks are computed
sequentially. Training stores one state per 1,024 tokens and recomputes the others.

    definition.py    the recurrence, token by token, in fp64
    operation.py     the chunked form and its gradients
    layer.py         configuration, state, module, cost
"""
