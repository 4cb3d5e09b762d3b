"""Writes gptq/: INT4 codes of the embedded model, by GPTQ on windows of the calibration text.

    python data/tiny/quantise.py                    a minute on a CPU; needs pip install -e '.[int4]'
    python data/tiny/quantise.py --out FOLDER       elsewhere

The same text, model and library give the same codes, but for a few that lie between two steps where another machine
adds in another order.
"""
import argparse
from pathlib import Path

from rsparse import gptq, models, texts
from rsparse.gptq_checkpoint import TINY

SAMPLES, LENGTH, SEED = 128, 512, 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=TINY, help="folder to write to")
    out = parser.parse_args().out
    ids = texts.token_ids("tiny", "calibration", models.load_tokenizer("tiny"), SAMPLES, LENGTH, SEED)
    gptq.write(out, models.load_model("tiny"), ids, "calibration text of data/tiny")


if __name__ == "__main__":
    main()
