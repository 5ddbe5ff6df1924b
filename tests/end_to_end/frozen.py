"""Imported last by the server that ranks are forked from: garbage collection leaves alone what was imported."""

import gc

gc.collect()
gc.freeze()
