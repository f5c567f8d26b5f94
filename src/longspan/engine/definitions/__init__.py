"""Dense definitions that those of several mechanisms share: softmax over visible keys, sums of features, RoPE."""
