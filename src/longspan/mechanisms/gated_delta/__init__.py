"""Gated DeltaNet (Yang, Kautz and Hatamizadeh 2024, arXiv 2412.06464): a memory that forgets and overwrites.

Each kv head has a matrix S of key_dim rows and value_dim columns. A token first lets all of it fade, then takes out
what its key reads, and writes its value there:

    S_t = a_t (I - b_t k_t k_t^T) S_{t-1} + b_t k_t v_t^T,    o_t = q_t S_t
    a_t = exp(-exp(A_log) softplus(W_a x_t + dt_bias)),       b_t = sigmoid(W_b x_t)

x is the layer's input, as its projections read it. q, k and v are the projections of x, each through a causal depthwise
convolution over `conv_size` tokens and SiLU; q and k then have length one. Outputs are RMSNorm(o_t) SiLU(W_g x_t), with
one norm of value_dim weights for all heads.

Choices. Queries are not multiplied by key_dim ** -0.5, which the authors' kernels do and the paper's equations do not:
the norm takes any factor out again, and without it the norm's eps stays small beside o. With grouped queries a group
reads one state, that of its kv head, so decays and strengths belong to kv heads (they say what is written) and gates to
query heads. The recurrence knows positions, so RoPE is not applied. A_log and dt_bias begin as in the authors' code.

Keeps, per row: S of each kv head in fp32 (it does not grow with the stream, so fp64 is not needed) and conv_size - 1
columns of q, k and v, at any length. Costs, per token and head, about (4 C + 3 value_dim) key_dim multiply-adds in
chunks of C = 64 for value_dim = key_dim; only the states between chunks are made one after the other. Training keeps
one state in 1,024 tokens, and makes the others again.

    definition.py    the recurrence, token by token, in fp64
    operation.py     chunks and their gradients
    layer.py         fields, state, layer, cost
"""
