"""Reverse-KL on-policy context distillation."""

# A subprocess imports this before it has the path of the standard library: nothing is imported.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from minidistill.api import LoadedConfig, Run, UserError, bake, load_config, run

__version__ = "0.2.0"
__all__ = ["LoadedConfig", "Run", "UserError", "bake", "load_config", "run"]


def __getattr__(name: str) -> object:
    """What Python uses, imported when it is asked for: the command's help needs none of it."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from minidistill import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
