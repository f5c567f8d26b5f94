"""What every mechanism is made of: its contract and traits, the layout of a call, projections, states, the registry.

`base` has the contract, `rows` the layout of a call, `projections` the maps to queries, keys and values, `registry` the
mechanisms by name. States that several mechanisms share are in `kv_cache`, `rings`, `segments` and `relative`; `sizes`
counts bytes and pairs, `redraw_every` serves those that draw projections, `replay` the choices of reversible blocks,
`gradients` parameters that a call did not use, `maps` what may be asked of modules that hold weights.
"""
