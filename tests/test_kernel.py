"""The panel in a real notebook kernel: a search in its background, and buttons that are clicked as a browser clicks them."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ipywidgets", reason="the notebook's panel needs ipywidgets")
jupyter_client = pytest.importorskip("jupyter_client", reason="a real kernel needs ipykernel")
pytest.importorskip("ipykernel", reason="a real kernel needs ipykernel")
pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent

CELLS = [
    '\nfrom pathlib import Path\nimport json, optuna\nfrom peft import LoraConfig\nfrom trl import SFTConfig, SFTTrainer\nfrom rapidfire_automl import RapidFireExecutor, Search, in_background, panel, run_search\nfrom rapidfire_automl.plan import Plan\nfrom tests.tiny.data import MODEL, sums\n\ntrain, held_out = sums(16, seed=3), sums(8, seed=4)\nexecutor = RapidFireExecutor(str(MODEL), slots=2, chunks=1000, plan=Plan(reason="a test"), output_dir="out")\n\ndef objective(trial):\n    return SFTTrainer(\n        model=executor.model(trial),\n        peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),\n        args=SFTConfig(\n            learning_rate=trial.suggest_float("learning_rate", 1e-6, 1e-1, log=True), lr_scheduler_type="constant",\n            per_device_train_batch_size=16, num_train_epochs=4000, logging_steps=1, save_strategy="no",\n            report_to="none", bf16=False, gradient_checkpointing=False, use_cpu=True, disable_tqdm=True),\n        train_dataset=train, eval_dataset=held_out, processing_class=executor.tokenizer)\n\nstudy = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))\nstudy.enqueue_trial({"learning_rate": 2e-3})\nshown = panel(executor)\nresult = in_background(run_search, executor, objective, study=study, n_trials=1, run_dir="out", own=True)\nshown\n',
    'models = {verb: button.model_id for verb, button in shown.buttons.items()}\nmodels |= {name: getattr(shown, name).model_id for name in ("table", "message", "changes", "trial")}\nprint(json.dumps(models))\n',
    'summary = result.result(60).summary\nlogs = [[entry["loss"] for entry in record.log_history if "loss" in entry] for record in executor.records.values()]\nprint(json.dumps({"logs": logs, "trials": summary["trials"], "status": summary["status"]}))\n',
    'other = panel(Search("out"), every_s=0)\nother.buttons["stop"].click()\nprint(json.dumps([other.table.value, other.message.value, list(other.trial.options)]))\n',
]


class Browser:
    """What a notebook's page does: runs cells, clicks buttons, types into fields, and sees what widgets show."""

    def __init__(self, client: Any) -> None:
        self._client = client
        self.seen: dict[str, dict[str, Any]] = {}

    def run(self, code: str) -> str:
        """Run a cell; what it printed."""
        request, printed = self._client.execute(code), ""
        while True:
            message = self._next(120)
            content, mine = message["content"], message["parent_header"].get("msg_id") == request
            if message["msg_type"] == "stream" and mine and content["name"] == "stdout":
                printed += content["text"]
            assert message["msg_type"] != "error" or not mine, "\n".join(content["traceback"])
            if message["msg_type"] == "status" and mine and content["execution_state"] == "idle":
                return printed

    def _next(self, timeout_s: float) -> dict[str, Any]:
        message: dict[str, Any] = self._client.get_iopub_msg(timeout=timeout_s)
        if message["msg_type"] in ("comm_open", "comm_msg"):
            data = message["content"]["data"]
            self.seen.setdefault(message["content"]["comm_id"], {}).update(data.get("state", {}))
        return message

    def tell(self, model: str, data: dict[str, Any]) -> None:
        client = self._client
        client.shell_channel.send(client.session.msg("comm_msg", {"comm_id": model, "data": data}))

    def click(self, model: str) -> None:
        self.tell(model, {"method": "custom", "content": {"event": "click"}})

    def type(self, model: str, text: str) -> None:
        self.tell(model, {"method": "update", "state": {"value": text}, "buffer_paths": []})

    def wait(self, model: str, fits: Callable[[str], Any]) -> str:
        """Wait until a widget shows it; what it shows."""
        until = time.monotonic() + 120
        while time.monotonic() < until:
            value: str = self.seen.get(model, {}).get("value", "")
            if fits(value):
                return value
            self._next(60)
        raise TimeoutError(self.seen.get(model))


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "policies"), os.environ.get("PYTHONPATH", "")]),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "IPYTHONDIR": str(tmp_path / "ipython"),
    }
    manager = jupyter_client.KernelManager(kernel_name="python3")
    manager.start_kernel(cwd=str(tmp_path), env=environment)
    client = manager.client()
    client.start_channels()
    try:
        client.wait_for_ready(timeout=120)
        yield Browser(client)
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


def test_pause_on_the_panel_clone_halve_the_learning_rate_warm_start_resume(browser: Browser, tmp_path: Path) -> None:
    browser.run(CELLS[0])
    models = json.loads(browser.run(CELLS[1]))
    row = r"<td>{}[ ★]*<td>[^<]*<td>([0-9]+)/"

    def chunks(trial: int, least: int) -> Callable[[str], bool]:
        return lambda table: any(int(done) >= least for done in re.findall(row.format(trial), table))

    browser.wait(models["table"], chunks(0, 2))
    browser.click(models["pause"])
    message = browser.wait(models["message"], lambda text: "pause 0 (applied): paused, at" in text)
    within = re.findall(r"at step ([0-9]+) of", message)  # else between two chunks of four steps
    step = int(within[0]) if within else 4 * int(re.findall(r"at the end of chunk ([0-9]+) of", message)[0])
    assert ">paused<" in browser.wait(models["table"], lambda table: ">paused<" in table)
    browser.type(models["changes"], "learning_rate=/2")
    browser.click(models["clone"])
    browser.wait(models["message"], lambda text: "clone 0 (applied): trial 1 is next in line for a slot" in text)
    browser.wait(models["table"], chunks(1, 2))
    browser.click(models["resume"])
    browser.wait(models["message"], lambda text: "resume 0 (applied): goes on, at" in text)
    browser.wait(models["table"], chunks(0, step // 4 + 2))
    browser.click(models["cancel"])
    browser.wait(models["message"], lambda text: "cancel (applied)" in text)
    found = json.loads(browser.run(CELLS[2]))
    source, clone = found["trials"]
    assert found["status"] == "cancelled"
    assert clone["params"] == {"learning_rate": source["params"]["learning_rate"] / 2} == {"learning_rate": 1e-3}
    assert len(source["spans"]) == 2 and len(found["logs"][0]) > step
    # Every step goes over all examples, so the clone's first loss is the source's first after the pause.
    assert found["logs"][1][0] == pytest.approx(found["logs"][0][step], rel=1e-4)
    assert found["logs"][1][1] != pytest.approx(found["logs"][0][step + 1], rel=1e-6), "its learning rate is another"
    log = [json.loads(line) for line in (tmp_path / "out" / "events.jsonl").read_text().splitlines()]
    told = [event["data"] for event in log if event["kind"] == "command"]
    assert [c["verb"] for c in told] == ["pause", "clone", "resume", "cancel"]
    assert {c["source"] for c in told} == {"notebook panel"}
    # A panel on the run folder, as from another notebook, shows how it ended.
    table, message, options = json.loads(browser.run(CELLS[3]))
    assert table.count(">cancelled<") == 2
    assert "runs no more: the search was cancelled" in message
    assert options == [0, 1]
