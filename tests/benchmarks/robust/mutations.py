"""Strangers' files: models, states and latents are changed at random, and each is loaded or refused.

    python -m tests.benchmarks.robust.mutations --count 100000 --seed 1 > tests/benchmarks/robust/mutations.txt

A change is one of bytes (bits, cuts, splices, what the header claims of its length) or of structure (values, keys and
entries of the JSON in the header and of the JSON in that). Of the files that were changed in structure most get a
new checksum, as a stranger would give them: what is behind it has to hold by itself.

A mutant with its old checksum must load to the very content of the original, one with a new checksum to content that
works: the model encodes a text and writes one. All else must be refused with an error of ours and exit code 3. Anything
else is a crash. A mutant that takes a minute ends the command.
"""

from __future__ import annotations

import argparse
import ast
import faulthandler
import hashlib
import io
import json
import os
import platform
import random
import re
import resource
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gptvae_cli import sampling
from gptvae_cli.checkpoint import Checkpoint, load, save_model
from gptvae_cli.cli.info import _rows, _summary
from gptvae_cli.config import DataConfig, ModelConfig, SampleConfig, SizeConfig, TrainConfig
from gptvae_cli.device import Device, Precision
from gptvae_cli.errors import ExitCode, GPTVAEError
from gptvae_cli.header import FORMAT_VERSION, ModelHeader, read_layout
from gptvae_cli.latent_file import LatentWriter, read_latents
from gptvae_cli.model import GPTVAE
from gptvae_cli.run import resume, start
from gptvae_cli.tokenizer import Tokenizer

KINDS = ("model", "state", "latents")
WIDTH = 4
"""Z of all three."""
_HANG_SECONDS = 60
_CPU = Device(torch.device("cpu"), "the only one")
_FLOAT32 = Precision(torch.float32, "exact")


# Changes of bytes -----------------------------------------------------------------------------------------------------


def mutated_bytes(content: bytes, chance: random.Random) -> bytes:
    """Bits flipped, bytes set, a piece cut out, doubled or moved, the end cut off or gone on."""
    data = bytearray(content)
    place, other = chance.randrange(len(data)), chance.randrange(len(data))
    size = min(len(data) - place, 1 << chance.randrange(12))
    match chance.randrange(8):
        case 0:
            for _ in range(chance.randint(1, 8)):
                data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        case 1:
            for _ in range(chance.randint(1, 4)):
                data[chance.randrange(min(len(data), 200))] = chance.randrange(256)
        case 2:
            del data[place:]
        case 3:
            data += chance.randbytes(size)
        case 4:
            del data[place : place + size]
        case 5:
            data[other:other] = data[place : place + size]
        case 6:
            data[other : other + size] = data[place : place + size]
        case _:
            data[place : place + size] = bytes([chance.choice((0, 255))]) * size
    return bytes(data)


# Changes of structure -------------------------------------------------------------------------------------------------


class Object(list[tuple[str, Any]]):
    """A JSON object whose keys may occur twice."""


class Raw(str):
    """JSON text that is written as it is."""


def parsed(text: str) -> Any:
    return json.loads(text, object_pairs_hook=Object)


def dumped(value: Any) -> str:
    match value:
        case Raw():
            return str(value)
        case Object():
            return "{" + ",".join(f"{json.dumps(name)}:{dumped(inner)}" for name, inner in value) + "}"
        case list():
            return "[" + ",".join(map(dumped, value)) + "]"
        case _:
            return json.dumps(value)


def odd_value(chance: random.Random) -> Any:
    depth = chance.choice((chance.randrange(100), chance.randrange(900, 1000), 3000))
    return chance.choice(
        [
            *(None, True, False, -1, 0, 1, 2, 3, 5, 0.5, -0.0, 1e300, 2**31, 2**48, 2**53, 2**63, 2**64, 10**30),
            *(
                "",
                "x",
                "x" * 5000,
                "\ud800",
                "\x1b[31m\n",
                "a.*(b+)+",
                "Replace",
                "Sequence",
                "BPE",
                "F64",
                "BF16",
                "I8",
            ),
            *(Object(), [], [[]], [1] * 100, [2**62, 2**62], [0, 2**64], Object([("type", "Sequence")])),
            *map(Raw, ("NaN", "-Infinity", "1e999", "9" * 4000, "9" * 5000, "[" * depth + "]" * depth, "nonsense", "")),
        ]
    )


def mutate(value: Any, chance: random.Random) -> Any:
    """A JSON value with one change somewhere in it; JSON in a string is looked into."""
    if isinstance(value, str) and value.startswith("{") and chance.random() < 0.9:
        with suppress(ValueError, RecursionError):  # a change before this one may have broken it
            return dumped(mutate(parsed(value), chance))
    if not isinstance(value, list) or not value or chance.random() < 0.1:
        if type(value) is int and chance.random() < 0.5:
            return value + chance.choice((-1, 1, 8, -8, value))
        return odd_value(chance)
    values = value[:] if not isinstance(value, Object) else Object(value)
    # Ends as often as all that is between: of a vocabulary, little else would ever be changed.
    place = chance.choice((0, len(values) - 1, chance.randrange(len(values)), chance.randrange(len(values))))
    other = chance.randrange(len(values))
    inner = values[place][1] if isinstance(values, Object) else values[place]
    match chance.randrange(10):
        case 0:
            del values[place]
        case 1:
            values.insert(other, values[place])
        case 2:
            values[place], values[other] = values[other], values[place]
        case 3 if isinstance(values, Object):
            values[place] = (values[other][0], inner)
        case 4 if isinstance(values, Object):
            values[place] = (chance.choice(("", "x", "\ud800", "type", "content", values[place][0] + "x")), inner)
        case _:
            changed = mutate(inner, chance)
            values[place] = (values[place][0], changed) if isinstance(values, Object) else changed
    return values


_TORCH_NAMES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64", "BOOL": "bool", "U8": "uint8"}
_TORCH_NAMES |= {f"I{bits}": f"int{bits}" for bits in (8, 16, 32, 64)}


def checksum(header: Object, data: bytes) -> str:
    """The checksum of a file of ours, computed as its description says and not as `checkpoint.py` does.

    Raises:
        KeyError, TypeError, ValueError: for a header that describes no tensors.
    """
    entries = {name: dict(entry) for name, entry in header if name != "__metadata__"}
    metadata = [(name, text) for name, text in dict(header)["__metadata__"] if name != "sha256"]
    frame = [(name, f"torch.{_TORCH_NAMES[e['dtype']]}", e["shape"]) for name, e in sorted(entries.items())]
    digest = hashlib.sha256(json.dumps([sorted(metadata), frame]).encode())
    for _, entry in sorted(entries.items()):
        begin, end = entry["data_offsets"]
        digest.update(data[begin:end])
    return digest.hexdigest()


def mutated_safetensors(content: bytes, chance: random.Random) -> tuple[bytes, bool]:
    """A model or state that is not as it was, and whether it has a checksum of its own."""
    kind = chance.random()
    if kind < 0.25:
        return mutated_bytes(content, chance), False
    length = int.from_bytes(content[:8], "little")
    if kind < 0.3:
        claimed = chance.choice((0, 1, length - 1, length + 1, 2 * length, 10**8, 2**31, 2**63, 2**64 - 1))
        return claimed.to_bytes(8, "little") + content[8:], False
    header, data = parsed(content[8 : 8 + length].decode()), bytearray(content[8 + length :])
    if chance.random() < 0.15:
        number = chance.choice((float("nan"), float("inf"), 1e30, -1e30, 1e-42, 0.0, 1.0))
        place = 4 * chance.randrange(len(data) // 4)
        data[place : place + 4] = np.float32(number).tobytes()
    else:
        for _ in range(chance.randint(1, 2)):
            # Of the metadata, where configuration and tokenizer are, as often as of all tensors together.
            names = [name for name, _ in header]
            place = names.index("__metadata__") if "__metadata__" in names else 0
            if header and isinstance(header[place][1], Object) and chance.random() < 0.7:
                header[place] = (names[place], mutate(header[place][1], chance))
            else:
                header = mutate(header, chance)
            if not isinstance(header, Object):
                header = Object()
    signed = chance.random() < 0.8
    if signed:
        try:
            signature = checksum(header, bytes(data))
        except (KeyError, TypeError, ValueError):
            signed = False
        else:
            # The last of several, as `checksum` takes it.
            place = max(i for i, (name, _) in enumerate(header) if name == "__metadata__")
            fields = Object((name, text) for name, text in header[place][1] if name != "sha256")
            header[place] = ("__metadata__", Object([*fields, ("sha256", signature)]))
    raw = dumped(header).encode()
    return len(raw).to_bytes(8, "little") + raw + bytes(data), signed


def mutated_npy(content: bytes, chance: random.Random) -> tuple[bytes, bool]:
    """A file of latents that is not as it was; it has no checksum, so all that it may hold is valid."""
    if chance.random() < 0.4:
        return mutated_bytes(content, chance), True
    length = int.from_bytes(content[8:10], "little")
    header, data = ast.literal_eval(content[10 : 10 + length].decode()), content[10 + length :]
    sizes = (-1, 0, 1, 3, WIDTH, 5, 2**31, 2**62, 2**63, 10**30, True, 2.0, None, "4")
    match chance.randrange(6):
        case 0:
            header["shape"] = tuple(chance.choice(sizes) for _ in range(chance.randrange(4)))
        case 1:
            header["shape"] = (chance.choice(sizes), WIDTH)
        case 2:
            types = ("<f2", ">f4", "<f8", "=f4", "|f4", "<f16", "<c8", "<i4", "|O", "|b1", "<U3", "", "f4,f4", "<f4\n")
            header["descr"] = chance.choice((*types, None, 4, [("a", "<f4")], ("<f4", (2,))))
        case 3:
            header["fortran_order"] = chance.choice((True, 0, 1, None, "False", []))
        case 4:
            name = chance.choice((*header, "more", b"shape", None, 1))
            if header.pop(name, None) is None:
                header[name] = 1
        case _:
            for _ in range(chance.randint(1, 2)):
                kind = chance.choice(("<f2", "<f4", ">f8"))
                number = chance.choice((float("nan"), float("inf"), -1e39, 1e-42, 1.0))
                with np.errstate(over="ignore"):
                    item = np.array(number, kind).tobytes()
                place = chance.randrange(len(data))
                data = data[:place] + item + data[place + len(item) :]
    text = repr(header)
    if chance.random() < 0.2:
        odd = ("(" * 300, "[" * 90 + "]" * 90, "9" * 4500, "-" * 5000 + "1", "\0", "{[]: 1}", "1 if 1 else 2", "\u00e9")
        place = chance.randrange(len(text))
        text = text[:place] + chance.choice(odd) + text[place:]
    version = chance.choice((b"\x01\x00",) * 6 + (b"\x02\x00", b"\x03\x00", b"\x04\x00", b"\xff\xff"))
    raw = text.encode("latin1").ljust(chance.choice((0, 117)))
    claimed = (
        chance.choice((len(raw),) * 8 + (0, len(raw) - 1, 2**16 - 1, 2**31)) if chance.random() < 0.5 else len(raw)
    )
    width = 2 if version == b"\x01\x00" else 4
    return b"\x93NUMPY" + version + (claimed % 256**width).to_bytes(width, "little") + raw + data, True


# What becomes of a mutant ---------------------------------------------------------------------------------------------


@dataclass
class Tally:
    """What became of the mutants of one kind; times in seconds."""

    kind: str
    mutants: int = 0
    loaded: int = 0
    refused: int = 0
    crashes: list[str] = field(default_factory=list)
    reasons: Counter[str] = field(default_factory=Counter)
    slowest: float = 0.0
    memory: int = 0
    """MiB that the process grew by, beyond its peak before."""


class Target:
    """Originals in a folder, and what it means that a mutant of one loads."""

    def __init__(self, folder: Path) -> None:
        self.run = folder / "run"
        self.originals = {
            "model": _write_model(folder / "model.safetensors"),
            "state": _write_run(self.run),
            "latents": _write_latents(),
        }
        self.path = {"model": folder / "mutant.safetensors", "state": self.run / "state.safetensors"}
        self.loaders: dict[str, Callable[[bytes, bool], object]] = {
            "model": self._model,
            "state": self._state,
            "latents": self._latents,
        }
        self.expected = {kind: self.loaders[kind](self.originals[kind], False) for kind in KINDS}

    def mutant(self, kind: str, chance: random.Random) -> tuple[bytes, bool]:
        """A changed file, and whether what it holds may differ from the original."""
        content = self.originals[kind]
        return mutated_npy(content, chance) if kind == "latents" else mutated_safetensors(content, chance)

    def judge(self, kind: str, data: bytes, *, differs: bool) -> str | None:
        """None where a mutant was loaded, what was said where it was refused.

        Raises:
            BaseException: anything else that came of it.
        """
        try:
            found = self.loaders[kind](data, differs)
        except GPTVAEError as error:
            assert error.exit_code == ExitCode.BAD_INPUT, f"exit code {error.exit_code}: {error.message}"
            # One line and nothing that a terminal obeys, as `console` would show it.
            assert "\n" not in error.message, error.message
            assert len(error.message) < 1000 + len(str(self.path.get(kind, ""))), error.message[:2000]
            return error.message
        assert differs or found == self.expected[kind], "it loads, as something else"
        return None

    def _model(self, data: bytes, use: bool) -> object:
        self.path["model"].write_bytes(data)
        # What `gptvae info` shows, of a header alone.
        list(_rows(_summary("mutant", read_layout(self.path["model"]))))
        checkpoint = load(self.path["model"], device=_CPU.device)
        if use:
            _use(checkpoint)
        return checkpoint.header, _digest(dict(checkpoint.model.state_dict()))

    def _state(self, data: bytes, use: bool) -> object:
        self.path["state"].write_bytes(data)
        job = resume(self.run, {}, sources=[], device=_CPU, precision=_FLOAT32)
        if use:
            job.learner.check_finite()
        return job.data, job.model_config, job.learner.config, job.learner.counters, _digest(job.learner.tensors())

    def _latents(self, data: bytes, use: bool) -> object:
        found = read_latents(io.BytesIO(data), "z.npy", width=WIDTH)
        assert found.dtype == np.float32 and found.ndim == 2 and found.shape[1] == WIDTH
        assert np.isfinite(found).all()
        assert found.nbytes <= 2 * len(data), "more than the file has, in halves"
        return found.tobytes()


def _digest(tensors: dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode() + tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _use(checkpoint: Checkpoint) -> None:
    """Encodes a text, and writes a short one."""
    encoder = sampling.Encoder(checkpoint, checkpoint.header.data.unit)
    means = [encoding.mean_Z for encoding in encoder.encode(["a text, naïve"])]
    requests = sampling.repeated(means, 1)
    list(sampling.write(checkpoint, requests, SampleConfig(max_tokens=3), unit=checkpoint.header.data.unit))


def _write_model(path: Path) -> bytes:
    tokenizer = Tokenizer.train_bpe(["a text of texts"] * 20, 270)
    config = ModelConfig(
        num_tokens=tokenizer.num_tokens,
        dim=8,
        depth=1,
        enc_depth=1,
        max_seq_len=16,
        dim_latent=WIDTH,
        heads=2,
        attn_dim_head=8,
        pad_id=tokenizer.pad_id,
        bos_id=tokenizer.bos_id,
        eos_id=tokenizer.eos_id,
        conditioning="token",
    )
    torch.manual_seed(0)
    training = {"steps": 3, "train": {"latents_dropout_prob": 0.1}, "validation": {"kl": 1.5}}
    header = ModelHeader(FORMAT_VERSION, config, DataConfig(), tokenizer.to_json(), training)
    save_model(path, GPTVAE.from_config(config), header)
    return path.read_bytes()


def _write_run(folder: Path) -> bytes:
    corpus = folder.parent / "corpus.txt"
    corpus.write_text("".join(f"text number {i}\n" for i in range(30)))
    folder.mkdir()
    sizes = SizeConfig(preset="nano", dim=8, depth=1, enc_depth=1, heads=2, attn_dim_head=8, dim_latent=WIDTH)
    data, config = DataConfig(tokenizer="bytes"), TrainConfig(steps=3, max_time=None, batch_tokens=64)
    job = start(folder, [str(corpus)], data, config, sizes=sizes, device=_CPU, precision=_FLOAT32)
    for _ in job.run(should_stop=lambda: False, seconds=lambda: 1.0):
        pass
    (folder / "state.prev.safetensors").unlink()  # or it would take the place of every mutant
    return (folder / "state.safetensors").read_bytes()


def _write_latents() -> bytes:
    with io.BytesIO() as stream:
        with LatentWriter(stream, WIDTH) as writer:
            writer.write(np.random.default_rng(0).standard_normal((5, WIDTH)))
        return stream.getvalue()


def run(target: Target, kind: str, count: int, seed: int) -> Tally:
    """Makes mutants of one kind, each a function of kind, seed and number, and counts what becomes of them."""
    tally = Tally(kind)
    before = _peak_mib()
    for number in range(count):
        chance = random.Random(f"{kind} {seed} {number}")
        data, differs = target.mutant(kind, chance)
        if data == target.originals[kind]:
            continue
        faulthandler.dump_traceback_later(_HANG_SECONDS, exit=True)
        began = time.perf_counter()
        try:
            said = target.judge(kind, data, differs=differs)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            tally.crashes.append(
                f"{kind} {number} of seed {seed}: {type(error).__name__} in {Path(where.filename).name}:{where.lineno}:"
                f" {str(error)[:300]}"
            )
        else:
            tally.loaded += said is None
            tally.refused += said is not None
            if said is not None:
                tally.reasons[_reason(said)] += 1
        tally.slowest = max(tally.slowest, time.perf_counter() - began)
        tally.mutants += 1
    faulthandler.cancel_dump_traceback_later()
    tally.memory = _peak_mib() - before
    return tally


def _reason(message: str) -> str:
    """What a message is about, for counting: its words, without the values."""
    if message.startswith("cannot load "):
        message = message.partition(": ")[2]
    return " ".join(re.findall(r"(?<![\w'])[a-zA-Z]+(?![\w'])", message))[:70]


def _peak_mib() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak // 2**20 if sys.platform == "darwin" else peak // 2**10


@contextmanager
def quiet_panics() -> Iterator[None]:
    """Sends what the tokenizers library prints when it panics nowhere."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        # Watchdog and warnings still reach people.
        with os.fdopen(os.dup(kept), "w") as stderr, redirect_stderr(stderr):
            yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=6000, help="mutants in all, spread over the kinds evenly")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kind", choices=KINDS, action="append", help="one kind only; may be repeated")
    options = parser.parse_args()
    kinds = tuple(options.kind or KINDS)
    torch.set_num_threads(1)
    tallies = []
    with tempfile.TemporaryDirectory() as folder, quiet_panics():
        target = Target(Path(folder))
        for place, kind in enumerate(kinds):
            count = options.count // len(kinds) + (place < options.count % len(kinds))
            tallies.append(run(target, kind, count, options.seed))
    print(f"python {platform.python_version()}, torch {torch.__version__}, {platform.system()}; seed {options.seed}")
    print(f"{'kind':<10} {'mutants':>9} {'loaded':>8} {'refused':>8} {'crashed':>8} {'slowest':>9} {'memory':>9}")
    for tally in tallies:
        print(
            f"{tally.kind:<10} {tally.mutants:>9,} {tally.loaded:>8,} {tally.refused:>8,} {len(tally.crashes):>8,}"
            f" {tally.slowest:>7.2f} s {tally.memory:>5,} MiB"
        )
    print("\nWhy mutants were refused, the ten commonest reasons of each kind:")
    for tally in tallies:
        for reason, count in tally.reasons.most_common(10):
            print(f"{tally.kind:<10} {count:>9,}  {reason}")
    crashes = [crash for tally in tallies for crash in tally.crashes]
    print("\n".join(crashes[:50]))
    return 1 if crashes else 0


if __name__ == "__main__":
    sys.exit(main())
