"""Time and energy of a piece of work, with raw samples, units and sources; never torch.

`latency` times candidates against each other. `energy` is what all meters share; `sysfs` (RAPL, power rails), `pmic`, `gpu`,
`battery` and `estimate` are the sources, and `sources` finds and opens them by name.
"""
