"""The parts of every mechanism: its contract and traits, the layout of a call, projections, states, the registry.

`base` has the contract, `rows` the layout of a call, `projections` the maps to queries, keys and values, `registry` the
mechanisms by name. States that several mechanisms share are in `kv_cache`, `rings`, `segments` and `relative`. `sizes`
counts bytes and pairs, `redraw_every` has the base class of mechanisms with random projections, `replay` records
discrete choices for reversible blocks, `gradients` gives unused parameters a zero gradient, `maps` has safe ways to
read modules that hold weights.
"""
