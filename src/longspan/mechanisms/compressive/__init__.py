"""Compressive Transformer: Transformer-XL whose evicted memory is compressed, `ratio` vectors into one slot.

    h~ = [SG(compressed), SG(memory), h],  q = h W_q,  k = h~ W_k,  v = h~ W_v
    at a segment's end: old = what leaves the memory,  compressed <- last slots of [compressed, f_c(old)]

One softmax covers all three parts, with Transformer-XL's relative positions. Distances count slots, so the newest slot
is at distance mem_len + 1 from the start of the segment. Source: Rae et al. 2019, section 3, algorithms 1 and 2. With
`mem_len + compressed_len` keys of memory, tokens up to mem_len + ratio * compressed_len positions back are seen.

The memory holds hidden states that are projected again at each use, so that W_k and W_v keep learning from it.
Gradients do not cross a segment boundary (horizon 1). Segment boundaries are positions, and compression happens only
there. Vectors that have left the memory but do not fill a group yet (ratio - 1 at most) wait and are not seen by any
token; so any segment length works with any ratio.

The model's loss does not reach the compression function f_c. f_c learns from an auxiliary loss, which calls that
complete a segment append to `aux_losses`: attention reconstruction, || attend(h, old) - attend(h, f_c(old)) ||^2 for
the queries of the segment (those in this call), content only; or auto-encoding, || old - g(f_c(old)) ||^2; both as
means. Its gradients reach f_c (and the decoder g) only. These parameters form an optimizer group of their own,
"compressor".
"""
