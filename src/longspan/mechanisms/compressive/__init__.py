"""Compressive Transformer: what falls out of Transformer-XL's memory is compressed, `ratio` vectors to one slot.

    h~ = [SG(compressed), SG(memory), h],  q = h W_q,  k = h~ W_k,  v = h~ W_v
    at a segment's end: old = what leaves the memory,  compressed <- last slots of [compressed, f_c(old)]

One softmax over all three, with Transformer-XL's relative positions; distances count slots, so the newest slot stands
mem_len + 1 before the segment. Source: Rae et al. 2019, section 3, algorithms 1 and 2. For `mem_len + compressed_len`
keys of memory, tokens up to mem_len + ratio * compressed_len back are seen.

Memory holds hidden states, projected again at each use, so that W_k and W_v go on learning from it; gradients do not
pass a segment border (horizon 1). Segment borders are positions and compression happens there only. Vectors that left
the memory and do not fill a group yet (ratio - 1 at most) wait, seen by nobody; so any segment goes with any ratio.

The loss of the model never reaches f_c. f_c learns from an auxiliary loss, appended to `aux_losses` by calls that close
a segment: attention reconstruction, || attend(h, old) - attend(h, f_c(old)) ||^2 for the queries of the segment (those
of this call), content only, or auto-encoding, || old - g(f_c(old)) ||^2; both as means. Its gradients reach f_c (and g)
only. The parameters are an optimiser group of their own, "compressor".
"""
