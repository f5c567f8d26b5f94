"""Associative memory per layer: attention inside segments plus a memory of earlier segments, written by the delta rule.

A segment is a stretch of `segment` positions. When it is complete, learned memory queries of the layer attend to its
keys and values. Each memory query yields one key-value pair, which ARMT's delta rule writes into the memory
(`longspan.ops.associative_write`). Every token adds the memory's answer to its query to its local attention:

    out_i = A_local,i + phi(W_q q_i) A / (phi(W_q q_i) . z + 1e-5),   phi = DPFP

The delta rule, its gamma (differentiated here) and the feature map are those of ARMT (Rodkin et al. 2024, section 3).
The step size is damped: pairs written together would overshoot, and the memory would grow without bound in training.
This mechanism is not ARMT itself, where memory tokens pass through all layers and the memory is added to hidden states;
for that, use `RecurrentMemory(..., per_layer=True)`. The value projection starts at zero, so a new memory changes
nothing until it is trained. The memory is read and written without RoPE; RoPE is applied inside segments.
"""
