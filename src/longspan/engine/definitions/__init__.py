"""Dense definitions that several mechanisms share: softmax over visible keys, sums of features, RoPE."""
