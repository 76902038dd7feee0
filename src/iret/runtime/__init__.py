"""What goes on the device: NumPy, Pillow and later an engine; never torch.

`cost` counts multiply-accumulates, `keep` is the reference of the keep rules, `points` is the table a budget is looked
up in, `preprocess` turns a photo into an array.
"""
