"""Associative memory in a layer: attention inside segments, and what closed ones say, written by the delta rule.

When a segment closes, learned memory queries of the layer attend to its keys and values; what each of them hears is a
pair that ARMT's delta rule writes (`longspan.ops.associative_write`). Every token adds to its local attention what the
memory answers to its query:

    out_i = A_local,i + phi(W_q q_i) A / (phi(W_q q_i) . z + 1e-5),   phi = DPFP

The rule, its gamma (differentiated here) and the feature map are those of ARMT (Rodkin et al. 2024, section 3); its
step is damped, as pairs that are written together overshoot and the memory then grows without bound in training. This
is not ARMT: there the memory tokens go through all layers and the memory is added to hidden states; that is
`RecurrentMemory(..., per_layer=True)`. Values start at zero, so a new memory changes nothing until it is trained.
Memory reads and writes before positions; RoPE acts inside segments.
"""
