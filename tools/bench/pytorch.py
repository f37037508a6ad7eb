"""PyTorch in a worker: ordinary fine-tuning, and the rivals that are written with it. Knows torch."""

from __future__ import annotations

import contextlib
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from tools.bench import rivals
from tools.bench.processes import peak_of, processor_seconds, save_gradients, settle
from tools.bench.subjects import SUBJECTS
from tools.bench.tails import Tail, saved_bytes


class PyTorch:
    """One way to train the tail with PyTorch, that does one thing at a time when told."""

    def __init__(self, cell: Path, name: str, threads: int) -> None:
        """Cut the model as ``cell`` says, and compute the features of its batches.

        Raises:
            ValueError: the rival has nothing to do with the layers of this model.
        """
        torch.set_num_threads(threads)
        told = json.loads((cell / "cell.json").read_text())
        subject = SUBJECTS[told["model"]]
        batches = []
        for index in range(3):
            with np.load(cell / f"batch-{index}.npz") as stored:
                batches.append((torch.from_numpy(stored["x"]), torch.from_numpy(stored["y"])))
        model = subject.model(Path(told["cache"]))
        self._tail = Tail(model, batches[0][0], told["trained"], subject.blocks)
        self._frozen = [*model.parameters(), *model.buffers()]
        self._name, self._watch = name, rivals.Watch()
        codec = self._codec(told)
        coded = {s.weight: s.call for s in self._tail.steps if s.weight is not None and s.weight in told["layers"]}
        self._calls = rivals.replacements(codec, coded, self._watch) if codec else None
        if self._calls is not None and not self._calls:
            raise ValueError(f"{name} has nothing to keep here: no trained layer is one that it knows")
        self._batches = batches
        self._features = [[f.numpy() for f in self._tail.trunk(x)] for x, _ in batches]
        self._x, self._targets = batches[0][0], [y for _, y in batches]
        del batches, self._batches
        parameters = list(self._tail.parameters.values())
        self._optimizer = torch.optim.SGD(parameters, lr=0.0, momentum=0.9)
        for value in parameters:  # the state that a first step would make
            self._optimizer.state[value]["momentum_buffer"] = torch.full_like(value, 0.0)

    def _codec(self, told: dict[str, Any]) -> rivals.Codec | None:
        layers = told["layers"]
        if self._name == "pytorch-hosvd":
            return rivals.Hosvd(told["epsilon"])
        if self._name == "pytorch-asi":
            return rivals.Asi({name: tuple(layer["asi_ranks"]) for name, layer in layers.items()})
        if self._name.startswith("pytorch-filter-r"):
            return rivals.GradientFilter(int(self._name.removeprefix("pytorch-filter-r")))
        return None

    def _loss(self, features: list[Tensor], y: Tensor) -> Tensor:
        wide = torch.autocast("cpu", torch.bfloat16) if self._name == "pytorch-bf16" else contextlib.nullcontext()
        with wide:
            if self._name == "pytorch-checkpoint":
                scores = self._tail.forward_by_blocks(features)
            else:
                scores = self._tail.forward(features, self._calls)
            return functional.cross_entropy(scores, y)

    def _given(self, index: int = 0) -> list[Tensor]:
        return [torch.from_numpy(f) for f in self._features[index]]

    def step(self) -> dict[str, float]:
        """Do one step from the features, and return its seconds."""
        return self._step(self._given())

    def _step(self, features: list[Tensor]) -> dict[str, float]:
        self._watch.seconds = 0.0
        used, begin = processor_seconds(), time.perf_counter()
        loss = self._loss(features, self._targets[0])
        loss.item()
        forward = time.perf_counter()
        loss.backward()  # type: ignore[no-untyped-call]
        backward = time.perf_counter()
        self._optimizer.step()
        self._optimizer.zero_grad()
        end = time.perf_counter()
        spent = self._watch.seconds
        return {
            "step": end - begin, "processor": processor_seconds() - used, "forward": forward - begin - spent,
            "compress": spent, "backward": backward - forward, "update": end - backward, "train": backward - begin,
        }  # fmt: skip

    def trunk(self) -> dict[str, float]:
        """Compute the features once."""
        begin = time.perf_counter()
        self._tail.trunk(self._x)
        return {"trunk": time.perf_counter() - begin}

    def peak(self) -> dict[str, int]:
        """Return the peak of a step, see ``peak_of``."""
        held = self._features[0]
        with contextlib.ExitStack() as stack:
            scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            np.savez(scratch / "features.npz", *held)
            self._features[0] = []
            del held

            def load() -> list[Tensor]:
                with np.load(scratch / "features.npz") as stored:
                    return [torch.from_numpy(stored[name]) for name in stored.files]

            found = peak_of(load, self._step)
            self._features[0] = [f.numpy() for f in load()]
        return found

    def gradients(self, file: str) -> dict[str, Any]:
        """Write the gradients of the batch to ``file``; return loss, captured energies and shapes of what is kept."""
        for index in (1, 2):
            self._loss(self._given(index), self._targets[index])
        self._watch.looking = True
        loss = self._loss(self._given(), self._targets[0])
        self._watch.looking = False
        loss.backward()  # type: ignore[no-untyped-call]
        made = {
            name: value.grad.float().numpy() for name, value in self._tail.parameters.items() if value.grad is not None
        }
        save_gradients(file, made)
        self._optimizer.zero_grad()
        return {"loss": loss.item(), "energy": dict(self._watch.energies), "shapes": dict(self._watch.shapes)}

    def saved(self) -> dict[str, Any]:
        """Return the bytes of the storages that autograd holds after the forward pass, weights and buffers excluded."""
        # the targets are there for the loss whatever is done to the rest
        own = [*self._frozen, self._targets[0]]
        return {"saved": saved_bytes(lambda: self._loss(self._given(), self._targets[0]), own)}

    def held(self) -> dict[str, Any]:
        """Return what the allocator has in use after the forward pass, above the targets and what is always there."""
        from tools.codec_memory import in_use_bytes

        def forward() -> int:
            features = [f.clone() for f in self._given()]
            before = in_use_bytes() - sum(f.untyped_storage().nbytes() for f in features)
            loss = self._loss(features, self._targets[0])
            now = in_use_bytes()
            del loss
            return now - before

        forward()
        settle()
        return {"held": forward()}

    def phases(self) -> dict[str, float]:
        """Nothing: every step tells its phases itself."""
        return {}
