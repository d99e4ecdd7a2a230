"""Calibrations of models that we could measure, as ``arkv_fx.kept`` names and finds them.

Each was made by ``calibrate(model, tokenizer=tokenizer)`` in float32 with default options, on the
text that is read then; its file was moved here from the cache folder.
"""
