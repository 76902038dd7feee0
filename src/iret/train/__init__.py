"""Training: `recipe` says what, `data` from what, `augment` and `loss` one step, `loop` the run, `monitor` how it is watched."""
