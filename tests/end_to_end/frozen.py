"""Imported last by the server that ranks are forked from: what all of them need is made once, and never walked."""

import gc

from tiny import tiny_model

tiny_model()  # it is saved first, for which transformers compiles some thousand expressions
gc.collect()
gc.freeze()
gc.set_threshold(20_000, 20, 20)
