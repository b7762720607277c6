"""gptvae: a GPT with a Gaussian latent, trained on your text and driven from your shell.

Importing the package loads nothing heavy; a name is imported when it is first asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gptvae_cli.api import Model, Posteriors, load
    from gptvae_cli.errors import CheckpointError, ConfigError, DataError, DeviceError, GPTVAEError
    from gptvae_cli.model import GPTVAE

__version__ = "0.1.0"
__all__ = [
    "GPTVAE",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "DeviceError",
    "GPTVAEError",
    "Model",
    "Posteriors",
    "__version__",
    "load",
]


if not TYPE_CHECKING:  # or any name would be one to a type checker

    def __getattr__(name: str) -> Any:
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        import sys
        from importlib import import_module

        if sys.platform == "win32":
            from gptvae_cli.errors import NOT_ON_WINDOWS

            raise ImportError(NOT_ON_WINDOWS)
        home = "model" if name == "GPTVAE" else "errors" if name.endswith("Error") else "api"
        return getattr(import_module(f"{__name__}.{home}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
