"""A model as files for other engines: one graph a stage, and `bundle.json` for the host that chooses between them."""
