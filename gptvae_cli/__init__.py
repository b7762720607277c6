"""gptvae: a GPT with a Gaussian latent, trained on your text and driven from your shell.

Importing the package loads nothing heavy; `GPTVAE` is imported when it is first asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gptvae_cli.model import GPTVAE

__version__ = "0.1.0"
__all__ = ["GPTVAE", "__version__"]


def __getattr__(name: str) -> Any:
    if name == "GPTVAE":
        from gptvae_cli.model import GPTVAE

        return GPTVAE
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
