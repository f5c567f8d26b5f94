"""Memorizing Transformer: local attention, and the nearest of the keys and values stored before (2203.08913).

    local     softmax over 0 <= i - j < window; RoPE where the model has it
    memory    softmax of scale cos(q, k_j) over the k stored keys of largest cosine; no positions
    out       g memory + (1 - g) local,  g = sigmoid(gate) per head;  local alone while the store is empty

Source: Wu et al. 2022, section 3.1 and figure 2; in the paper one layer has a memory, here those whose mixer this is.
A segment is `window` positions; its pairs enter the store when it closes, so a token retrieves only from segments
before its own. The store holds the last `max_memories` pairs, oldest evicted first, starts empty with every document
and is not trained through: gradients reach the queries, and older keys only as far as the window does.

Stored keys and the queries that are compared with them have norm 1, as keys that were made by older parameters would
else be out of scale (section 3.2), so cosines are multiplied by a scale per head, which is learned. Local attention
takes q and k as they are (the paper normalises them there too), so that a closed gate is plain window attention and a
pretrained model keeps what it knows.

The search is exact, by blocks (`operation`). A store on disk, exact or with faiss, may take the place of
the one in the state: see `MemorizingMechanism.attach` and `memory_store`.
"""
