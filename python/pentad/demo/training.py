# SPDX-License-Identifier: Apache-2.0
"""A small language model, trained on the documentation through pentad's layers, and its twin.

The twin (`plain`) starts from the same parameters, reads the same bytes in the same order, and has
to reach the same losses. Each trains in a process of its own, so that each one's peak of memory is
its own.
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .stage import Context, Result, Table, in_process

BATCH, LENGTH = 8, 256
TEXT_BYTES = 8 << 20
RATE = 3e-3  # of learning, at its highest
HELD_OUT = 16  # batches of text that is not trained on
TWIN_STEPS = 8
# Between the losses of the two, in bits: float32 sums in another order, through as many updates.
TOLERANCE = 2e-3
STEP_TOLERANCE = 1e-3  # of the logits, between one byte at a time and a whole sequence
PROMPTS = (b"Return the ", b"Parameters\n----------\n")
GENERATED = 220  # bytes


class Trained(NamedTuple):
    """Losses of the steps in bits a byte, seconds of each, and bytes that memory rose by."""

    losses: list[float]
    seconds: list[float]
    peak: int | None
    held_out: float = math.nan
    step_error: float = math.nan
    samples: tuple[str, ...] = ()
    step_seconds: float = math.nan
    parameters: int = 0

    @property
    def rate(self) -> float:
        """Tokens a second, at the median step that is not the first, in which libraries start."""
        return BATCH * LENGTH / float(np.median(self.seconds[1:]))


def run(context: Context) -> Result:
    steps, twin_steps = (10, 3) if context.small else (400, TWIN_STEPS)
    text = context.out / "documentation.txt"
    text.write_bytes(documentation(context))
    checkpoint = context.out / "model.safetensors"
    ours, plain = (
        in_process(train, *its, progress=context.progress)
        for its in (
            ("pentad", text, steps, steps, checkpoint),
            ("plain", text, twin_steps, steps, None),
        )
    )
    return present(ours, plain, [checkpoint, text])


def present(ours: Trained, plain: Trained, files: list[Path]) -> Result:
    from . import plots  # not in the processes that train

    result = Result("A model", files=files)
    both = zip(ours.losses, plain.losses, strict=False)  # one of them goes on
    difference = float(np.max([abs(a - b) for a, b in both]))
    result.check(
        difference <= TOLERANCE,  # False of NaN
        f"losses of the first {len(plain.losses)} steps differ by {difference:.2g} bits from "
        f"plain PyTorch's, more than {TOLERANCE}",
    )
    result.check(
        ours.step_error <= STEP_TOLERANCE,
        f"logits of one byte at a time differ by {ours.step_error:.2g} from those of the whole "
        f"sequence, more than {STEP_TOLERANCE}",
    )
    trained = len(ours.losses) * BATCH * LENGTH
    result.about = (
        f"A hybrid of selective scan, attention to a window and a memory of product keys, with "
        f"{ours.parameters / 1e6:.1f} million parameters, over bytes. It read "
        f"{trained / 1e6:.2f} MB of the documentation in {len(ours.losses)} steps: "
        f"{ours.losses[0]:.2f} bits a byte at first, {ours.held_out:.2f} on unseen text at the end."
    )
    rows = [
        [
            name,
            f"{len(it.losses)}",
            f"{it.losses[len(plain.losses) - 1]:.4f}",
            f"{it.rate:,.0f}",
            "unknown" if it.peak is None else f"{it.peak / 2**20:,.0f}",
        ]
        for name, it in (("pentad", ours), ("plain PyTorch", plain))
    ]
    note = (
        f"The same model, parameters and data, each in a process of its own. Losses of the first "
        f"{len(plain.losses)} steps differ by at most {difference:.1g} bits ({TOLERANCE} is "
        "allowed). Memory is what the process rose by in training. Plain PyTorch goes through the "
        "scan step by step, as transformers does on a CPU. One byte at a time, with caches, takes "
        f"{1000 * ours.step_seconds:.1f} ms and gives the logits of the whole sequence within "
        f"{ours.step_error:.1g} ({STEP_TOLERANCE} is allowed)."
    )
    columns = ["layers", "steps", f"loss at step {len(plain.losses)}", "tokens/s", "peak MiB"]
    result.tables.append(Table("Training", columns, rows, note))
    result.texts["The model, asked to go on"] = "\n\n".join(ours.samples)
    result.figures["loss"] = plots.losses(ours.losses, plain.losses, ours.held_out)
    measures = {"training, tokens a second": [ours.rate, plain.rate]}
    if ours.peak is not None and plain.peak is not None:
        measures["peak memory of training, MiB"] = [ours.peak / 2**20, plain.peak / 2**20]
    result.figures["training"] = plots.bars(
        ["pentad", "plain PyTorch"], measures, muted=[False, True]
    )
    return result


def documentation(context: Context) -> bytes:
    """Passages in an order drawn once, so that unseen text is of the same kind."""
    passages = context.passages
    order = np.random.default_rng(0).permutation(len(passages))
    texts, size = [], 0
    for i in order:
        texts.append(f"{passages[i].name}\n{passages[i].text}\n\n".encode("utf-8", "replace"))
        size += len(texts[-1])
        if size > TEXT_BYTES:
            break
    return b"".join(texts)


# --- In the process of its own --------------------------------------------------------------------


def train(report, kind: str, text: Path, steps: int, schedule: int, checkpoint) -> Trained:
    """`steps` of a training that is planned for `schedule`; with `checkpoint`, what comes after."""
    import torch
    from torch.nn.functional import cross_entropy

    import pentad.nn

    from . import plain
    from .model import Config, HybridLM

    torch.manual_seed(0)
    model = HybridLM(Config(), pentad.nn if kind == "pentad" else plain)
    data = torch.from_numpy(np.fromfile(text, np.uint8)).long()
    unseen = HELD_OUT * BATCH * LENGTH if len(data) > 50 * BATCH * LENGTH * HELD_OUT else 2048
    if len(data) < 2 * unseen:
        raise ValueError(f"{len(data)} bytes of documentation are too few to train on")
    data, held_out = data[:-unseen], data[-unseen:]
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.98))
    rates = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / 20, 0.05 + 0.95 * math.cos(step / schedule * math.pi / 2)),
    )
    generator = torch.Generator().manual_seed(1)
    losses, seconds = [], []
    before = peak_memory()
    for step in range(steps):
        starts = torch.randint(len(data) - LENGTH, (BATCH,), generator=generator)
        batch = torch.stack([data[at : at + LENGTH + 1] for at in starts])
        begin = time.perf_counter()
        scores = model(batch[:, :-1])
        loss = cross_entropy(scores.flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rates.step()
        seconds.append(time.perf_counter() - begin)
        losses.append(loss.item() / math.log(2))
        report(f"training, {'pentad' if kind == 'pentad' else 'plain PyTorch'}", step + 1, steps)
    peak = None if before is None else peak_memory() - before
    trained = Trained(losses, seconds, peak)
    return trained if checkpoint is None else finish(report, model, held_out, checkpoint, trained)


def finish(report, model, held_out, checkpoint: Path, trained: Trained) -> Trained:
    """Unseen text, a few lines of the model's own, the checkpoint."""
    import torch
    from safetensors.torch import save_file
    from torch.nn.functional import cross_entropy

    model.eval()
    sequences = held_out[: len(held_out) // LENGTH * LENGTH].view(-1, LENGTH)
    with torch.no_grad():
        bits = [
            cross_entropy(model(part[:, :-1]).flatten(0, 1), part[:, 1:].flatten()) / math.log(2)
            for part in sequences.split(BATCH)
        ]
        whole = model(sequences[:1])[0]
        caches = model.caches(1, LENGTH)
        stepped = [model.step(t[None], caches, i)[0] for i, t in enumerate(sequences[0])]
    error = float((torch.stack(stepped) - whole).abs().max())
    samples, began = [], time.perf_counter()
    for seed, prompt in enumerate(PROMPTS):
        text = model.generate(prompt, GENERATED, seed=seed)
        samples.append(text.decode("utf-8", "replace"))
        report("writing", len(samples), len(PROMPTS))
    took = (time.perf_counter() - began) / sum(len(p) + GENERATED - 1 for p in PROMPTS)
    save_file(model.state_dict(), checkpoint, {"config": repr(model.config)})
    return trained._replace(
        held_out=float(torch.stack(bits).mean()),
        step_error=error,
        samples=tuple(samples),
        step_seconds=took,
        parameters=sum(p.numel() for p in model.parameters()),
    )


def peak_memory() -> int | None:
    """The most bytes that this process ever had in memory, where the system tells."""
    status = Path("/proc/self/status")
    if status.exists():  # of this program alone; getrusage also counts what its parent had
        fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(fields["VmHWM"].split()[0]) * 1024
    try:
        import resource
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS
