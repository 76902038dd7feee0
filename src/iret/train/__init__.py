"""Training: `recipe` says what, `data` from what, `augment` and `loss` one step, `loop` the run, `checkpoint` keeps it."""
