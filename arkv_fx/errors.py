"""The errors that arkv_fx raises on purpose; all are `ArkvError`."""


class ArkvError(Exception):
    """The base of every error of arkv_fx."""


class ConfigError(ArkvError, ValueError):
    """An option has a value that cannot work; the message says what would."""


class UnknownOptionError(ConfigError):
    """An option names something that no registry holds; the message lists what they hold."""


class UnsupportedFormatError(ConfigError):
    """A storage format cannot hold vectors of the model's head dimension."""


class CacheError(ArkvError):
    """A cache is used in a way that would lose or mix tokens."""


class AbsorbedCacheError(CacheError):
    """A model's own past tensors were cropped, reordered, copied or filled elsewhere."""


class NonFiniteError(ArkvError, ValueError):
    """Keys or values hold NaN or infinity."""


class CalibrationError(ArkvError, ValueError):
    """A calibration is damaged, of another schema, or of another model."""


class TransformError(ArkvError):
    """A model cannot be transformed or restored as asked."""


class PassError(ArkvError):
    """A rewritten graph failed its own check: a bug in a pass."""


class ModelNotFoundError(ArkvError):
    """A model cannot be found or read; the message says what to install or choose."""


class KernelError(ArkvError):
    """A kernel cannot run here or on these tensors; the message says what it needs."""


class EvaluationError(ArkvError, ValueError):
    """A text, a prompt or a file of results does not fit the measurement asked for."""


class ExportError(ArkvError):
    """A model cannot be exported without losing something; nothing has been written."""


class EngineError(ArkvError):
    """An exported folder is damaged, incomplete, of another version, or used wrongly."""
