"""What goes on the device: NumPy, Pillow and one engine; never torch.

photo -> `preprocess` -> `session`, which goes through `stage` (on one of `engines`) and `choice` (rules: `keep`) in turn
budget, ms, joules -> `points` -> thresholds; `controller` turns the budget from call to call, by `estimates`
deadline -> `pace`; clock of this device -> `timing`; multiply-accumulates -> `cost`, `record`; files -> `bundle`
"""
