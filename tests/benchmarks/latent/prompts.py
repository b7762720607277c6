"""Where a prompt may end: how often what goes on with a part of a word makes a word of it.

    python -m tests.benchmarks.latent.study --corpora tatoeba_eng --minutes 20 --seeds 1 --arms small --keep models
    python -m tests.benchmarks.latent.prompts 'models/tatoeba_eng, small, 1.safetensors'

Test sentences are cut within a word, or at its end, at random, and written on from the latents of the whole sentences
at temperature 1. A word is known if the texts to train on have it.
"""

from __future__ import annotations

import argparse
import os
import random
import re
from pathlib import Path

from gptvae_cli import load

WORD = re.compile(r"[A-Za-z']+")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="trained on English texts")
    parser.add_argument("--corpus", default="tatoeba_eng", help="whose test split is cut")
    parser.add_argument("--prompts", type=int, default=400)
    asked = parser.parse_args()
    data = Path(os.environ["GPTVAE_TEST_DATA"])
    known = set(WORD.findall((data / f"{asked.corpus}_train.txt").read_text("utf-8")))
    texts = (data / f"{asked.corpus}_test.txt").read_text("utf-8").splitlines()
    model = load(asked.model, device="cpu")
    for place in ("within a word", "at its end"):
        choice = random.Random(0)
        made = the_same = prompts = 0
        for text in choice.sample(texts, len(texts)):
            words = [w for w in WORD.finditer(text) if len(w[0]) > 3 and w.start() > 3 and w.end() < len(text) - 1]
            if not words or prompts == asked.prompts:
                continue
            word = choice.choice(words)
            cut = word.start() + choice.randrange(1, len(word[0])) if place == "within a word" else word.end()
            (written,) = model.generate(model.encode([text]), prompt=text[:cut], seed=1)
            found = WORD.match(written, word.start())
            assert found is not None
            prompts += 1
            made += found[0] in known
            the_same += found[0] == word[0]
        print(f"{place}: {prompts} prompts, a known word {made / prompts:.1%}, the very word {the_same / prompts:.1%}")


if __name__ == "__main__":
    main()
