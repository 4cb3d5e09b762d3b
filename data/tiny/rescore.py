"""Scores the committed checkpoint on the committed tasks and writes the result into training.json.

For when test items change and the training text does not: `python data/tiny/rescore.py`, minutes on two cores.
"""
import json
from pathlib import Path

import score
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

HERE = Path(__file__).parent
BATCH = 64


def main() -> None:
    tokenizer = AutoTokenizer.from_pretrained(HERE / "model")
    model = AutoModelForCausalLM.from_pretrained(HERE / "model", dtype=torch.float32).eval()
    scores = score.score_tasks(model, tokenizer, HERE / "tasks", BATCH, alone=True)
    record = json.loads((HERE / "training.json").read_text())
    record["model"] |= {"tasks": scores, "average": sum(one["acc"] for one in scores.values()) / len(scores),
                        "items_sha256": score.items_digest(HERE / "tasks")}
    (HERE / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    for task, values in scores.items():
        print(f"{task:14s} " + "  ".join(f"{key} {value:.3f}" for key, value in values.items()))


if __name__ == "__main__":
    main()
