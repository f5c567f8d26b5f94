"""Softmax over a window and a learned linear memory of all tokens before it, in one denominator.

    out_i = (sum_{j in window or sink} e^{s_ij} v_j + sum_{j before} f_ij v_j) / (the same sums with v_j = 1)
    s_ij  = q_i . k_j / sqrt(d)
    f_ij  = e^{gate} phi(q_i; A_q) . phi(k_j; A_k)
    phi(x; A) = e^{-|x|^2 / 2} [e^{x A}, e^{-x A}] / sqrt(2 m),  x scaled by d^{-1/4}

The form is that of LoLCATs (Zhang et al. 2024, section 3.3): a window, and learned features (Hedgehog, Zhang et al.
2024) for what has left it. Two things differ. Both parts are on one scale: LoLCATs divides the window's terms by their
own maximum, so that the balance of the parts depends on it; here features are exponentials, and their logarithms are
carried along, as in FAVOR+. And A starts as the orthogonal projection of FAVOR+ (Choromanski et al. 2021), with which
f_ij is an unbiased estimate of e^{s_ij}: the untrained memory already approximates the attention that it replaces, and
training moves A_q and A_k apart. With a gate far below 0 this is a window with sinks.

A key enters the memory when it leaves the window, and sinks never do, so every pair counts once and a stream is exact.
State: `window` keys and values, sinks, and per kv head the sums S (2 m x d) and z (2 m) in fp64.

    definition.py    every pair, entry by entry
    operation.py     window by tiles, memory by chunks
    layer.py         configuration, state, module, cost
"""
