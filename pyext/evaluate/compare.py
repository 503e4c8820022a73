"""Seven ways to adapt a model to a task, measured side by side: `fusedpeft compare`.

Each method trains in a process of its own, so that its peak of memory is its own, once for each of
three learning rates around its usual one. The rate is chosen on rows kept for that; what is shown
was measured on others. Complete methods are kept, and a second call goes on with the rest.
"""

from __future__ import annotations

import gc
import math
import multiprocessing
import resource
import statistics
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from fusedpeft import layers as fp
from fusedpeft.errors import InputError
from fusedpeft.evaluate import compare_state
from fusedpeft.evaluate.compare_model import adapt, batch, encode, load_model, read_base
from fusedpeft.evaluate.compare_tasks import TASKS, Row, Rows, load_rows
from fusedpeft.files import write_json
from fusedpeft.ops import linear_logprob
from fusedpeft.train.chat import greedily

# Name -> its usual learning rate on a small model; a third, one and three of it are tried.
RATES = {
    "feature-based": 1e-2,
    "output layer": 1e-2,
    "full": 1e-3,
    "LoRA": 5e-3,
    "bottleneck": 5e-3,
    "prefix": 3e-2,
    "prompt": 3e-2,
}
FACTORS = (1 / 3, 1.0, 3.0)
_NEW_TOKENS = 48


@dataclass(frozen=True)
class Settings:
    base: str
    task: str
    data: str
    text: str | None = None  # text that the base was trained on, to see what is forgotten
    steps: int = 200
    batch_size: int = 16
    train_rows: int = 1600
    tune_rows: int = 200
    test_rows: int = 400
    seed: int = 0


def methods_of(task: str) -> list[str]:
    """A classifier over features writes no sentence."""
    return [name for name in RATES if task == "nsmc" or name != "feature-based"]


# --- one method, in its own process -------------------------------------------------------------


class Measured:
    """A model with a method on it, its rows encoded once."""

    def __init__(self, settings: Settings, name: str, rows: Rows):
        self.settings, self.name, self.task = settings, name, settings.task
        self.model, self.tokenizer = load_model(settings)
        adapt(self.model, name, self.task)
        self.device, self.pad = self.model.device, self.model.config.pad_token_id
        # Room for what stands in front, and for what is to be written.
        most = (getattr(self.model.config, "max_position_embeddings", None) or 1024) - 64
        self.rows = {
            part: [(row, encode(self.task, self.tokenizer, row, most)) for row in own]
            for part, own in asdict_rows(rows).items()
        }

    def batches(self, part: str, order: Sequence[int] | None = None):
        rows, size = self.rows[part], self.settings.batch_size
        order = range(len(rows)) if order is None else order
        for at in range(0, len(order), size):
            chosen = [rows[i] for i in order[at : at + size]]
            yield batch(self.task, chosen, self.pad, self.device)

    def train(self, rate: float) -> list[float]:
        """Seconds of each step. AdamW, a tenth of the steps up, then down to zero."""
        steps, generator = self.settings.steps, torch.Generator().manual_seed(self.settings.seed)
        learned = [p for _, p in self._learned()]
        optimizer = torch.optim.AdamW(learned, lr=rate, weight_decay=0.0)
        up = max(1, steps // 10)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda i: min((i + 1) / up, (steps - i) / max(1, steps - up))
        )
        self.model.train()
        seconds: list[float] = []
        while len(seconds) < steps:
            order = torch.randperm(len(self.rows["train"]), generator=generator).tolist()
            for inputs in self.batches("train", order):
                start = time.perf_counter()
                loss = self.model(**inputs).loss
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(learned, 1.0)
                optimizer.step()
                schedule.step()
                self._wait()
                seconds.append(time.perf_counter() - start)
                if len(seconds) == steps:
                    break
        return seconds

    def keep(self, path: Path) -> None:
        """What was trained."""
        torch.save({n: p.detach() for n, p in self._learned()}, path)

    @torch.no_grad()
    def take(self, path: Path) -> None:
        """What another one of the same settings has kept."""
        kept = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        for name, p in self._learned():
            p.copy_(kept[name])

    def _learned(self) -> list[tuple[str, nn.Parameter]]:
        return [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    @torch.no_grad()
    def quality(self, part: str) -> dict[str, float]:
        """nsmc: accuracy and loss a row; e2e: loss a token of the answers."""
        self.model.eval()
        right = count = total = 0.0
        for inputs in self.batches(part):
            out = self.model(**inputs)
            if self.task == "nsmc":
                right += (out.logits.argmax(-1) == inputs["labels"]).sum().item()
                learned = len(inputs["labels"])
            else:
                learned = (inputs["labels"][:, 1:] != -100).sum().item()
            total, count = total + out.loss.item() * learned, count + learned
        found = {"loss": total / count}
        return {"accuracy": right / count, **found} if self.task == "nsmc" else found

    @torch.no_grad()
    def coverage(self, most: int = 48) -> tuple[float, list[dict[str, str]]]:
        """Share of the facts that greedy answers mention, and the first answers."""
        said = wanted = 0
        samples = []
        for row in {row.text: row for row, _ in self.rows["test"]}.values():
            prompt = self.tokenizer(f"{row.text} || ", return_tensors="pt").to(self.device)
            with greedily(self.model, max_new_tokens=_NEW_TOKENS, pad_token_id=self.pad) as config:
                out = self.model.generate(**prompt, generation_config=config)
            answer = self.tokenizer.decode(
                out[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True
            )
            said += sum(value in answer.lower() for value in row.values)
            wanted += len(row.values)
            samples.append({"facts": row.text, "answer": answer.strip()})
            if len(samples) == most:
                break
        return said / max(1, wanted), samples[:3]

    @torch.no_grad()
    def latency(self) -> float:
        """Median seconds of one row classified, or of 16 tokens written."""
        self.model.eval()
        seconds = []
        for row, (ids, _) in self.rows["test"][:12]:
            given = {"input_ids": torch.tensor([ids], device=self.device)}
            if self.task == "e2e":
                given = self.tokenizer(f"{row.text} || ", return_tensors="pt").to(self.device)
            start = time.perf_counter()
            if self.task == "e2e":
                count = {"max_new_tokens": 16, "min_new_tokens": 16}
                with greedily(self.model, **count, pad_token_id=self.pad) as config:
                    self.model.generate(**given, generation_config=config)
            else:
                self.model(**given)
            self._wait()
            seconds.append(time.perf_counter() - start)
        return statistics.median(seconds[2:])

    def stored_bytes(self) -> int:
        """What is kept for this task: the adapter, and the head where one is trained."""
        with tempfile.TemporaryDirectory() as folder:
            if self.name == "full":
                self.model.save_pretrained(folder)
            else:
                for adapter in self.model._fusedpeft.configs:
                    fp.save_adapter(self.model, Path(folder) / adapter, adapter)
            return sum(p.stat().st_size for p in Path(folder).rglob("*.safetensors"))

    @torch.no_grad()
    def text_loss(self, head: Tensor | None) -> float | None:
        """Nats a token of the pretraining text, by the base's own output layer."""
        if self.settings.text is None or head is None:
            return None
        self.model.eval()
        total = count = 0.0
        lines = Path(self.settings.text).read_text(encoding="utf-8").splitlines()
        for line in [line for line in lines if line.strip()][:64]:
            ids = self.tokenizer(line, return_tensors="pt")["input_ids"][:, :256].to(self.device)
            h = self.model.base_model(input_ids=ids, use_cache=False).last_hidden_state
            logp = linear_logprob(h[:, :-1], head.to(h.dtype), ids[:, 1:])
            total, count = total - logp.sum().item(), count + ids.shape[1] - 1
        return total / max(1, count)


def asdict_rows(rows: Rows) -> dict[str, list[Row]]:
    return {"train": rows.train, "tune": rows.tune, "test": rows.test}


def run_method(settings: Settings, name: str) -> dict[str, Any]:
    """Everything about one method; runs in a process of its own."""
    counts = (settings.train_rows, settings.tune_rows, settings.test_rows)
    rows = load_rows(settings.task, Path(settings.data), counts, settings.seed)
    causal = read_base(AutoModelForCausalLM, settings.base)
    head = causal.get_output_embeddings().weight.detach().clone()
    del causal
    before = _memory(reset=True)
    tried, best = [], None
    with tempfile.TemporaryDirectory() as folder:
        kept = Path(folder) / "best.pt"
        for factor in FACTORS:
            measured = Measured(settings, name, rows)
            head = head.to(measured.device)
            text_before = measured.text_loss(head) if best is None else best["text_before"]
            rate = RATES[name] * factor
            seconds = measured.train(rate)
            tuned = measured.quality("tune")
            loss = tuned["loss"] if math.isfinite(tuned["loss"]) else math.inf
            tried.append({"rate": rate, **tuned})
            if best is None or loss < best["tuned"]:
                measured.keep(kept)
                best = {"tuned": loss, "rate": rate, "text_before": text_before, "seconds": seconds}
            # One model at a time: a second one would be in the peak.
            del measured
            gc.collect()
        own = Measured(settings, name, rows)
        own.take(kept)
    result: dict[str, Any] = {"quality": own.quality("test"), "rate": best["rate"], "tried": tried}
    if settings.task == "e2e":
        result["quality"]["coverage"], result["samples"] = own.coverage()
    own.model.eval()
    output = own.model.get_output_embeddings() if settings.task == "e2e" else None
    result |= {
        "trainable": fp.trainable_parameters(own.model),
        "parameters": sum(p.numel() for p in own.model.parameters()),
        "step_ms": 1e3 * statistics.median(best["seconds"][len(best["seconds"]) // 10 :]),
        "latency_ms": 1e3 * own.latency(),
        "stored_bytes": own.stored_bytes(),
        "peak_bytes": _memory() - before,
        "text_before": best["text_before"],
        "text_after": own.text_loss(head if output is None else output.weight),
    }
    return result


def _memory(reset: bool = False) -> int:
    """Bytes at the peak: the GPU's, else the process's."""
    if torch.cuda.is_available():
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# --- all of them --------------------------------------------------------------------------------


def compare(
    settings: Settings,
    out: Path,
    methods: Sequence[str] | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Measures every method of the task (or `methods`), writes compare.json and compare.html into
    `out` after each, and returns the content of compare.json.

    What `out` has already from the same settings and files is kept. Raises InputError for what
    cannot be read, an unknown method, an `out` of other settings, and a process that ended without
    a result.
    """
    from fusedpeft.evaluate.compare_report import write_page

    console = console or Console()
    names = list(methods or methods_of(settings.task))
    for name in names:
        if name not in methods_of(settings.task):
            known = ", ".join(methods_of(settings.task))
            raise InputError(f"compare --method: expected one of {known}, got {name!r}")
    counts = (settings.train_rows, settings.tune_rows, settings.test_rows)
    load_rows(settings.task, Path(settings.data), counts, settings.seed)
    if settings.task not in TASKS or not (Path(settings.base) / "config.json").is_file():
        raise InputError(f"compare BASE: expected a folder with a model, got {settings.base}")
    if settings.text is not None and not Path(settings.text).is_file():
        raise InputError(f"compare --text: expected a file, there is none at {settings.text}")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"compare --out: expected a folder, got {out} ({error.strerror}): name another"
        ) from error
    path = out / "compare.json"
    found = compare_state.read(path, compare_state.identity(settings))
    for number, name in enumerate(names, 1):
        if name in found["methods"]:
            console.print(f"{name}: kept")
            continue
        console.print(f"{name} ({number} of {len(names)}): three learning rates …")
        start = time.monotonic()
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, context, max_tasks_per_child=1) as pool:
            try:
                result = pool.submit(run_method, settings, name).result()
            except BrokenProcessPool as error:
                raise InputError(f"compare {name}: its process was killed (memory?)") from error
        found["methods"][name] = result
        write_json(path, found)
        write_page(found, out / "compare.html")
        shown = ", ".join(f"{k} {v:.3f}" for k, v in result["quality"].items())
        console.print(f"{name}: {shown} in {time.monotonic() - start:.0f} s")
    return found
