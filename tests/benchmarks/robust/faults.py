"""Faults at every moment of a training: what the shell is told, what is left, and what a resumed run comes to.

    python -m tests.benchmarks.robust.faults > tests/benchmarks/robust/faults.txt

Every row is a process of its own that runs the command line on a tiny corpus, and meets its fault exactly where the
row says: a function of the package is wrapped, so that no row depends on time. Then the run is resumed by another
process, or started again where it had not yet read its corpus, and its last state and its model are compared, bit by
bit, with those of a run that nobody disturbed. A full disk is a limit on the size of files (RLIMIT_FSIZE), which needs
no privileges. The command ends with 1 if any row is not as it has to be.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import resource
import shutil
import signal
import stat
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors.torch import load_file

from gptvae_cli import checkpoint, latent_file, log, run, training
from gptvae_cli.cli import app
from gptvae_cli.header import STATE_NAME
from gptvae_cli.learner import Learner
from gptvae_cli.tokens import BulkTokenizer

Action = Callable[..., object]
"""What goes wrong; gets what the wrapped function gets."""
Moment = Callable[[Action], None]
"""Wraps a function of the package, in the process that is to meet the fault."""

_STEPS = 12
_OPTIONS = ("--preset", "nano", "--threads", "1", "--device", "cpu", "--dtype", "float32", "--batch-tokens", "128")
_SIZES = (
    "--dim",
    "32",
    "--depth",
    "1",
    "--enc-depth",
    "1",
    "--heads",
    "2",
    "--attn-dim-head",
    "16",
    "--dim-latent",
    "8",
)


# Moments --------------------------------------------------------------------------------------------------------------


def before(owner: Any, name: str, count: int = 1, *, to: str | None = None, behind: bool = False) -> Moment:
    """Just before a call of a function, or `behind` it, of those whose last argument has the name `to` the one with
    this number."""

    original = getattr(owner, name)

    def install(action: Action) -> None:
        calls = 0

        def wrapper(*args: Any, **options: Any) -> Any:
            nonlocal calls
            meant = to is None or Path(args[-1]).name == to
            calls += meant
            now = meant and calls == count
            if now and not behind:
                action(*args, **options)
            result = original(*args, **options)
            if now and behind:
                action(*args, **options)
            return result

        setattr(owner, name, wrapper)

    return install


def while_writing(name: str, count: int) -> Moment:
    """When half of a file is there."""

    def install(action: Action) -> None:
        write, calls = safetensors.torch.save_file, 0

        def wrapper(tensors: Any, path: Path, **options: Any) -> None:
            nonlocal calls
            write(tensors, path, **options)
            calls += path.name == name
            if path.name == name and calls == count:
                os.truncate(path, path.stat().st_size // 2)
                action()
                write(tensors, path, **options)

        setattr(checkpoint, "save_file", wrapper)  # noqa: B010

    return install


def after_step(count: int) -> Moment:
    def install(action: Action) -> None:
        step = training._step

        def wrapper(learner: Learner, *args: Any) -> Any:
            result = step(learner, *args)
            if learner.counters.step == count:
                action(learner)
            return result

        setattr(training, "_step", wrapper)  # noqa: B010

    return install


READING: dict[str, Moment] = {
    "reading the corpus": before(BulkTokenizer, "__call__"),
    "the corpus is read": before(run, "place_cache"),
}
TRAINING: dict[str, Moment] = {
    "before the first step": before(training, "_step"),
    "in a step": before(torch.nn.utils, "clip_grad_norm_", 7),
    "in a validation": before(training, "measure", 4),
    "writing the log": before(log, "append_line", 5),
    "writing a model": while_writing("model.safetensors", 2),
    "model written, not renamed": before(Path, "replace", 2, to="model.safetensors"),
    "writing a state": while_writing("state.safetensors", 5),
    "state written, not renamed": before(Path, "replace", 4, to="state.prev.safetensors"),
    "between a state's renames": before(Path, "replace", 5, to="state.safetensors"),
    "state renamed, not synced": before(Path, "replace", 5, to="state.safetensors", behind=True),
    "at the verdict": before(run.Job, "load_best"),
}


# Faults ---------------------------------------------------------------------------------------------------------------


def send(*numbers: int) -> Action:
    def action(*args: Any, **options: Any) -> None:
        for number in numbers:
            signal.raise_signal(number)

    return action


def fill_disk(*args: Any, **options: Any) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def put_nan(learner: Learner, *args: Any) -> None:
    with torch.no_grad():
        next(iter(learner.named.values())).view(-1)[0] = float("nan")


def nothing(*args: Any, **options: Any) -> None:
    pass


@dataclass(frozen=True)
class Process:
    """The command line in a process of its own, and the pipe with its stderr, to which no limit on files applies."""

    number: int
    stderr: int

    def wait(self) -> tuple[int, str]:
        """What it said, and the exit code as a shell tells it: 128 and the number of a signal that killed it."""
        with os.fdopen(self.stderr, "rb") as pipe:
            told = pipe.read().decode()
        code = os.waitstatus_to_exitcode(os.waitpid(self.number, 0)[1])
        return (code if code >= 0 else 128 - code), told


def started(arguments: Sequence[str], stdout: Path, moment: Moment | None = None, action: Action = nothing) -> Process:
    """Starts the command line by a fork, because importing torch would take most of the time."""
    sys.stdout.flush()
    reader, writer = os.pipe()
    child = os.fork()
    if child:
        os.close(writer)
        return Process(child, reader)
    code = 1
    try:
        os.dup2(os.open(stdout, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
        os.dup2(writer, 2)
        # Every step is reported and every report saved: a state is never more than a step old.
        training.REPORT_SECONDS, run.STATE_SECONDS, run.METRICS_SECONDS = 0.0, 0.0, 0.0
        if moment is not None:
            moment(action)
        sys.argv = ["gptvae", *arguments]
        app.main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        with suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


# Rows -----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """What came of a fault; `wrong` says what should not have."""

    fault: str
    moment: str
    code: int
    left: str
    equal: str
    wrong: str | None


class Matrix:
    """A folder to work in, with a corpus and the run that nobody disturbed."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.told = folder, ""
        (folder / "corpus.txt").write_text(
            "".join(f"{word} number {i}\n" for i in range(20) for word in ("cat", "dog"))
        )
        self.undisturbed = folder / "undisturbed"
        assert self.gptvae(*self.train(self.undisturbed)) == 0, self.told
        self.numbers = 0

    def train(self, out: Path) -> list[str]:
        corpus = str(self.folder / "corpus.txt")
        return ["train", corpus, "--out", str(out), "--steps", str(_STEPS), *_OPTIONS, *_SIZES]

    def gptvae(self, *arguments: str, moment: Moment | None = None, action: Action = nothing) -> int:
        code, self.told = started(arguments, self.folder / "stdout", moment, action).wait()
        return code

    def new_folder(self, copy: bool = False) -> Path:
        self.numbers += 1
        out = self.folder / f"run{self.numbers}"
        if copy:
            shutil.copytree(self.undisturbed, out)
        return out

    def row(self, fault: str, moment: str, out: Path, code: int, expected: int, *said: str, resume: bool = True) -> Row:
        """Judges a training that has met its fault, and what it can still become."""
        told = self.told
        errors = re.findall("^gptvae: error: ", told, re.MULTILINE)
        wrong = [f"exit code {code}, expected {expected}"] if code != expected else []
        wrong += ["a traceback"] if "Traceback" in told else []
        wrong += ["not one line of error"] if expected in (1, 2, 3, 4, 75) and len(errors) != 1 else []
        wrong += [f"{word!r} is not said" for word in said if word not in told]
        left = self.left(out)
        equal = "-"
        if resume:
            again = ["train", "--resume", "--out", str(out), "--device", "cpu", "--dtype", "float32", "--threads", "1"]
            restarted = not checkpoint.state_exists(out / STATE_NAME)
            if (end := self.gptvae(*(self.train(out) if restarted else again))) != 0:
                wrong.append(f"going on ends with {end}: {self.told.strip()[-200:]}")
            same = end == 0 and self.same(out)
            wrong += [] if same else ["other weights"]
            wrong += [f"{name} is left" for name in unfinished(out)]
            equal = ("yes" if same else "no") + (", started again" if restarted else "")
        shutil.rmtree(out, ignore_errors=True)
        return Row(fault, moment, code, left, equal, "; ".join(wrong) or None)

    def same(self, out: Path) -> bool:
        """Whether a run came to the very weights, moments and model of the undisturbed one."""
        for name in ("state.safetensors", "model.safetensors"):
            found, expected = load_file(out / name), load_file(self.undisturbed / name)
            if found.keys() != expected.keys():
                return False
            if not all(torch.equal(found[key], tensor) for key, tensor in expected.items()):
                return False
        return True

    def left(self, out: Path) -> str:
        names = {"model": "model.safetensors", "state": "state.safetensors", "previous": "state.prev.safetensors"}
        names |= {"log": "metrics.jsonl", "cache": "cache"}
        found = [label for label, name in names.items() if (out / name).exists()]
        return " ".join(found + ["(unfinished)"] * bool(unfinished(out))) or "nothing"

    # The matrix

    def rows(self) -> Iterator[Row]:
        faults: dict[str, tuple[Action, int]] = {
            "SIGINT": (send(signal.SIGINT), 130),
            "SIGTERM": (send(signal.SIGTERM), 143),
            "SIGINT twice": (send(signal.SIGINT, signal.SIGINT), 130),
            "SIGKILL": (send(signal.SIGKILL), 137),
        }
        for fault, (action, expected) in faults.items():
            for moment, install in {**READING, **TRAINING}.items():
                out = self.new_folder()
                code = self.gptvae(*self.train(out), moment=install, action=action)
                yield self.row(fault, moment, out, code, expected)
        yield from self.full_disks()
        yield from self.divergences()
        yield self.two_runs()
        yield from self.flipped_bits()
        yield from self.outputs()

    def full_disks(self) -> Iterator[Row]:
        moments = {**READING, **TRAINING}
        del moments["at the verdict"]  # after which nothing is written
        for moment, install in moments.items():
            out = self.new_folder()
            code = self.gptvae(*self.train(out), moment=install, action=fill_disk)
            yield self.row("full disk", moment, out, code, 1, "cannot write", "File too large")

    def divergences(self) -> Iterator[Row]:
        for moment, install in {
            "before a step": before(training, "_step", 7),
            "after a step": after_step(7),
            "after the last step": after_step(_STEPS),
        }.items():
            out = self.new_folder()
            code = self.gptvae(*self.train(out), moment=install, action=put_nan)
            yield self.row("NaN in a weight", moment, out, code, 4, "training diverged")

    def two_runs(self) -> Row:
        """The first one waits in its fourth step until the second one has ended."""
        out = self.new_folder()
        reached, go_on = os.pipe(), os.pipe()

        def meet(*args: Any, **options: Any) -> None:
            os.write(reached[1], b"x")
            os.read(go_on[0], 1)

        first = started(self.train(out), self.folder / "stdout of the first", before(training, "_step", 4), meet)
        os.read(reached[0], 1)
        second = self.gptvae(*self.train(out), "--force")
        os.write(go_on[1], b"x")
        code, _ = first.wait()
        row = self.row("a second run", "in a step", out, second, 75, "in use by another training run")
        if code != 0:
            return Row(row.fault, row.moment, row.code, row.left, row.equal, f"the first one ended with {code}")
        return row

    def flipped_bits(self) -> Iterator[Row]:
        resume = ["--device", "cpu", "--dtype", "float32", "--threads", "1"]
        for moment, names, expected, said in (
            ("in the state", ["state"], 0, "state.prev.safetensors"),
            ("in both states", ["state", "state.prev"], 3, "the checksum differs"),
            ("in the model", ["model"], 3, "the checksum differs"),
        ):
            out = self.new_folder(copy=True)
            for name in names:
                flip_bit(out / f"{name}.safetensors")
            code = self.gptvae("train", "--resume", "--out", str(out), *resume)
            yield self.row("a flipped bit", moment, out, code, expected, said, resume=expected == 0)
        out = self.new_folder(copy=True)
        flip_bit(out / "model.safetensors")
        code = self.gptvae("generate", "--model", str(out))
        yield self.row("a flipped bit", "in a model to write with", out, code, 3, "the checksum differs", resume=False)

    def outputs(self) -> Iterator[Row]:
        """Of latents: what a command that fails leaves in the place of its file."""
        model = ["--model", str(self.undisturbed)]
        corpus = str(self.folder / "corpus.txt")
        encode = ["encode", corpus, *model]
        for label, arguments in {
            "encode --out /dev/full": [*encode, "--out", "/dev/full"],
            "encode --std-out /dev/full": [*encode, "--out", os.devnull, "--std-out", "/dev/full"],
            "interpolate --latents-out /dev/full": [
                *("interpolate", "--from", "a", "--to", "b", "--latents-out", "/dev/full"),
                *model,
            ],
        }.items():
            code = self.gptvae(*arguments)
            yield self.output_row("full disk", label, code, 1, Path("/dev/full"), said="cannot write /dev/full")
        in_the_middle = before(latent_file.LatentWriter, "write", 3)
        for fault, action, expected in (
            ("SIGINT", send(signal.SIGINT), 130),
            ("SIGTERM", send(signal.SIGTERM), 143),
            ("SIGKILL", send(signal.SIGKILL), 137),
            ("full disk", fill_disk, 1),
        ):
            for old in (False, True):
                out = self.new_folder() / "z.npy"
                out.parent.mkdir()
                if old:
                    out.write_bytes(b"as it was")
                code = self.gptvae(*encode, "--out", str(out), moment=in_the_middle, action=action)
                label = "encode --out, over a file" if old else "encode --out"
                yield self.output_row(fault, label, code, expected, out, content=b"as it was" if old else None)
        code = self.gptvae(*encode, moment=in_the_middle, action=send(signal.SIGINT))
        torn = (self.folder / "stdout").rename(self.folder / "torn.npy")
        yield self.output_row("SIGINT", "encode > z.npy", code, 130, torn, content=torn.read_bytes())
        code = self.gptvae("generate", *model, "--latent", str(torn))
        said = "gptvae encode did not come to its end"
        yield self.output_row("a torn file", "generate --latent z.npy", code, 3, torn, torn.read_bytes(), said=said)

    def output_row(
        self, fault: str, moment: str, code: int, expected: int, out: Path, content: bytes | None = None, said: str = ""
    ) -> Row:
        told = self.told
        wrong = [f"exit code {code}, expected {expected}"] if code != expected else []
        wrong += ["a traceback"] if "Traceback" in told else []
        wrong += [f"{said!r} is not said"] if said not in told else []
        device = out.exists() and stat.S_ISCHR(out.stat().st_mode)
        if device:
            left = "the device"
        elif out.exists():
            left = "the old file" if out.read_bytes() == b"as it was" else "a file that is no .npy"
            wrong += [] if out.read_bytes() == content else ["another file"]
        else:
            left = "nothing"
            wrong += [] if content is None else ["the file is gone"]
        if not device and unfinished(out.parent):
            left += " (unfinished)"
            wrong += [] if code == 137 else ["an unfinished file"]
        return Row(fault, moment, code, left, "-", "; ".join(wrong) or None)


def unfinished(folder: Path) -> list[str]:
    """What only a process that was killed leaves."""
    return [path.name for path in folder.glob("*") if path.suffix in (".tmp", ".part")]


def flip_bit(path: Path) -> None:
    """Of a weight: the last byte of the file."""
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    torch.set_num_threads(1)
    wrong = rows = 0
    print(
        f"python {platform.python_version()}, torch {torch.__version__}, {platform.system()}; {_STEPS} steps, float32"
    )
    print(f"{'fault':<16} {'moment':<36} {'exit':>4}  {'what was left':<44} weights equal")
    with tempfile.TemporaryDirectory() as folder:
        for row in Matrix(Path(folder)).rows():
            rows += 1
            wrong += row.wrong is not None
            print(f"{row.fault:<16} {row.moment:<36} {row.code:>4}  {row.left:<44} {row.equal}", flush=True)
            if row.wrong:
                print(f"  WRONG: {row.wrong}", flush=True)
    print(f"{rows} rows, {wrong} wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
