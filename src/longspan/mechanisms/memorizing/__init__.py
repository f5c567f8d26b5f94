"""Memorizing Transformer: local attention plus retrieval of the most similar stored keys and values (2203.08913).

    local     softmax over 0 <= i - j < window; RoPE where the model uses it
    memory    softmax of scale cos(q, k_j) over the k stored keys with the largest cosine; no positions
    out       g memory + (1 - g) local,  g = sigmoid(gate) per head;  local alone while the store is empty

Source: Wu et al. 2022, section 3.1 and figure 2. In the paper one layer has a memory; here every layer with this mixer
has one. A segment is `window` positions. Its key-value pairs enter the store when it is complete, so a token retrieves
only from segments before its own. The store holds the last `max_memories` pairs and evicts the oldest first. It starts
empty with every document and is not trained through: gradients reach the queries, and older keys only within the
window.

Stored keys, and the queries compared with them, are normalized to unit length; otherwise keys computed with older
parameters would have a different scale (section 3.2). So cosines are multiplied by a learned scale per head. Local
attention uses q and k without normalization (the paper normalizes them there too), so that a closed gate is plain
window attention and a pretrained model keeps its behavior.

The search is exact, block by block (`memorizing/operation.py`). A store on disk, searched exactly or with faiss, can
replace the one in the state: see `MemorizingMechanism.attach` and `memorizing/memory_store.py`.
"""
