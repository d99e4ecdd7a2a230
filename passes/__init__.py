"""Graph passes: one idea per file, listed in order by ``pipeline``. Imported as arkv_fx.passes."""
