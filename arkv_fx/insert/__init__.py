"""A cache for models that know none."""
