"""`gptvae demo`: the whole tool in two minutes, on names that come with it."""

from __future__ import annotations

import shlex
from importlib.resources import files
from pathlib import Path
from typing import Annotated

import typer

from gptvae_cli.cli import console, encode, flags, generate, interpolate, train
from gptvae_cli.config import TrainConfig
from gptvae_cli.errors import ConfigError, GPTVAEError
from gptvae_cli.options import parse_seconds

_EXAMPLES = ("emma", "christopher", "yasmin")
_RATE = "12"  # most of what there is in a name, so that names come back

EXAMPLES = """\
gptvae demo
gptvae demo --out names --max-time 5m
"""


def demo(
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Where everything goes.")] = Path("gptvae-demo"),
    max_time: Annotated[str, typer.Option(metavar="TIME", help="Of the training, as 90s or 5m.")] = "90s",
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier demo.")] = False,
    device: flags.DeviceOption = "auto",
    quiet: flags.QuietOption = False,
    debug: flags.DebugOption = False,
) -> None:
    """Train on 32,033 first names, then encode, generate and interpolate, saying what it does.

    It runs the commands that it shows, and leaves a model behind.
    """
    names, run, three, latents = (out / name for name in ("names.txt", "run", "three.txt", "z.npy"))
    if run.exists() and not force:
        raise ConfigError(f"{out} holds a demo already", hint="--force replaces it, --out FOLDER keeps it")
    TrainConfig(max_time=parse_seconds(max_time))  # checks it before anything is written
    contents = {
        names: files("gptvae_cli").joinpath("corpora/names_us.txt").read_bytes(),
        three: "".join(f"{name}\n" for name in _EXAMPLES).encode(),
    }
    try:
        foreign = [path for path, content in contents.items() if path.exists() and path.read_bytes() != content]
        if latents.exists() and not run.exists():
            foreign.append(latents)
        if foreign:
            raise ConfigError(
                f"{foreign[0]} is in the way and is not a demo's", hint="choose another folder with --out"
            )
        out.mkdir(parents=True, exist_ok=True)
        for path, content in contents.items():
            path.write_bytes(content)
    except OSError as error:
        raise GPTVAEError(
            f"cannot write to {out}: {error.strerror}", hint="choose another folder with --out"
        ) from error

    first, last = _EXAMPLES[:2]
    model = str(run)
    console.heading(
        "Train: an encoder that turns a name into 32 numbers, and a decoder that turns them back", quiet=quiet
    )
    _show("train", names, "--out", run, "--max-time", max_time, "--target-rate", _RATE, quiet=quiet)
    train.train(
        [str(names)], out=str(run), max_time=max_time, target_rate=float(_RATE), force=force, device=device, quiet=quiet
    )

    # From here on nothing has to be said that training has not said: where this computes, say.
    console.heading(f"Encode: {', '.join(_EXAMPLES)}, each to one row of a NumPy array", quiet=quiet)
    _show("encode", three, "--model", run, "--out", latents, quiet=quiet)
    encode.encode([str(three)], out=str(latents), model=model, device=device, quiet=True)

    console.heading("Generate: three names from each of these rows", quiet=quiet)
    _show("generate", "--latent", latents, "-n", "3", "--model", run, "--seed", "1", quiet=quiet)
    generate.generate(latent=str(latents), copies=3, model=model, seed=1, device=device, quiet=True)

    console.heading(f"Interpolate: the names between {first} and {last}", quiet=quiet)
    _show("interpolate", "--from", first, "--to", last, "--refine", "--model", run, quiet=quiet)
    interpolate.interpolate(start=first, end=last, refine=True, model=model, device=device, quiet=True)

    console.heading("Generate: ten names from random latents, which nobody may bear", quiet=quiet)
    _show("generate", "--prior", "10", "--model", run, "--seed", "1", quiet=quiet)
    generate.generate(prior=10, model=model, seed=1, device=device, quiet=True)

    console.heading("Your turn", quiet=quiet)
    console.command(f"gptvae generate --text YOURNAME -n 5 --model {shlex.quote(model)}", quiet=quiet)
    console.command("gptvae train YOURTEXT.txt", quiet=quiet)


def _show(*words: str | Path, quiet: bool) -> None:
    console.command(f"$ gptvae {shlex.join(map(str, words))}", quiet=quiet)
