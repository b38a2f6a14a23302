"""What checkpoints cost: the same search of SmolLM2-135M with and without them, in turns.

    python experiments/durability/overhead.py                 # minutes on a CPU; writes overhead.json
    python experiments/durability/overhead.py --rounds 10

A cell is a number of optimizer steps a chunk. `chunk_s` is the wall time of a chunk of one trial with all trials in
company, `packing` the share of the search's wall time in which training waited for states to be copied, and `writing`
that of the writer, which works beside training. `slower` is the wall time of a search with checkpoints over that of one
without in the same round: medians, with the smallest and largest. On a busy machine only the shares mean something.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import tempfile
import time
import tomllib
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

import optuna  # noqa: E402
from datasets import Dataset, disable_progress_bars  # noqa: E402
from peft import LoraConfig  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402
from trl import SFTConfig, SFTTrainer  # noqa: E402

from experiments import provenance  # noqa: E402
from rapidfire_automl import RapidFireExecutor  # noqa: E402
from rapidfire_automl.demo import base_path  # noqa: E402
from rapidfire_automl.plan import Plan  # noqa: E402


def search(base: tuple[Any, Any], wanted: dict[str, Any], steps: int, durable: bool) -> dict[str, Any]:
    """One search from its first step to its end; seconds, and what checkpoints have cost."""
    model, tokenizer = base
    rows = [f"Add {n} and {n + 7}: {2 * n + 7}." for n in range(steps * wanted["chunks"] * wanted["batch_size"])]
    train = Dataset.from_dict({"input_ids": [tokenizer(row)["input_ids"] for row in rows]})
    with tempfile.TemporaryDirectory(prefix="durability-") as folder:
        executor = RapidFireExecutor(
            model,
            tokenizer=tokenizer,
            slots=wanted["trials"],
            chunks=wanted["chunks"],
            plan=Plan(reason="fixed"),
            output_dir=Path(folder, "out"),
            durable=durable,
        )

        def objective(trial: optuna.Trial) -> SFTTrainer:
            return SFTTrainer(
                model=executor.model(trial),
                peft_config=LoraConfig(
                    r=wanted["rank"], target_modules=wanted["target_modules"], task_type="CAUSAL_LM"
                ),
                args=SFTConfig(
                    learning_rate=1e-4 * (1 + trial.number),
                    per_device_train_batch_size=wanted["batch_size"],
                    num_train_epochs=1,
                    save_strategy="no",
                    report_to="none",
                    use_cpu=True,
                    bf16=False,
                    disable_tqdm=True,
                    gradient_checkpointing=False,
                    dataset_kwargs={"skip_prepare_dataset": True},
                    output_dir=folder,
                ),
                train_dataset=train,
                eval_dataset=train.select(range(16)),
                processing_class=tokenizer,
            )

        study = optuna.create_study(
            storage=f"sqlite:///{folder}/study.db", sampler=optuna.samplers.RandomSampler(seed=0)
        )
        with executor:
            begin = time.perf_counter()
            executor.optimize(study, objective, n_trials=wanted["trials"])
            wall_s = time.perf_counter() - begin
            spent = executor.spent
            chunks = [second for record in executor.records.values() for second in record.seconds]
    found = {"durable": durable, "wall_s": wall_s, "trial_seconds_a_chunk": statistics.median(chunks)}
    if spent is not None:
        found |= {
            "checkpoints": spent.checkpoints,
            "checkpoint_bytes": spent.written_bytes // max(1, spent.checkpoints),
            "packing_s": spent.packing_s,
            "writing_s": spent.writing_s,
        }
    return found


def summary(runs: list[dict[str, Any]], wanted: dict[str, Any], steps: int) -> dict[str, Any]:
    """A cell's numbers."""
    durable = [run for run in runs if run["durable"]]
    ratios = [kept["wall_s"] / plain["wall_s"] for kept, plain in zip(durable, runs[1::2], strict=True)]
    chunk_s = statistics.median(run["wall_s"] for run in durable) / wanted["chunks"]
    return {
        "steps_a_chunk": steps,
        "chunk_s": chunk_s,
        "checkpoint_bytes": durable[0]["checkpoint_bytes"],
        "packing": statistics.median(run["packing_s"] / run["wall_s"] for run in durable),
        "writing": statistics.median(run["writing_s"] / run["wall_s"] for run in durable),
        "slower": statistics.median(ratios),
        "slower_range": [min(ratios), max(ratios)],
        "runs": runs,
    }


def main() -> None:
    """Measure, and write `overhead.json` after every cell."""
    config = tomllib.loads((HERE / "config.toml").read_text(encoding="utf-8"))
    wanted = config["overhead"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=wanted["rounds"])
    parser.add_argument("--dtype", default=wanted["dtype"], help="float32 where the CPU only emulates bfloat16")
    parser.add_argument("--out", type=Path, default=HERE / "overhead.json")
    given = parser.parse_args()
    disable_progress_bars()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    path = base_path()
    wanted["dtype"] = given.dtype
    base = (AutoModelForCausalLM.from_pretrained(path, dtype=given.dtype), AutoTokenizer.from_pretrained(path))
    results: dict[str, Any] = {**provenance.provenance(), "config": config, "base_sha256": provenance.sha256(path)}
    results |= {"load_before": provenance.load(), "status": "running", "cells": []}
    for steps in wanted["steps"]:
        search(base, wanted, 1, durable=True)  # nothing is timed cold
        runs = []
        for _, durable in itertools.product(range(given.rounds), (True, False)):
            runs.append(search(base, wanted, steps, durable))
        results["cells"].append(summary(runs, wanted, steps))
        results["load_after"] = provenance.load()
        provenance.write(given.out, results)
        cell = results["cells"][-1]
        print(
            f"{steps} steps a chunk, {cell['chunk_s']:.2f} s: packing {cell['packing']:.2%}, writing "
            f"{cell['writing']:.2%} beside it, wall x{cell['slower']:.3f}"
        )
    results["status"] = "complete"
    provenance.write(given.out, results)


if __name__ == "__main__":
    main()
