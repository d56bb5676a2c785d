"""Updates of the adapters by task, from the checkpoints of the stages; Figure 3 of Continual-NExT.

A branch is W_t = B_t A_t after stage t, and task t's update U_t = W_t - W_{t-1}, with W_0 = 0, for B starts at zero.
All norms and cosines follow from the inner products <W_s, W_t> = sum((B_s^T B_t) * (A_s A_t^T)); no W is ever formed.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cnext.analysis.result import Unavailable
from cnext.analysis.run import Run, mean_seen
from cnext.errors import UserError
from cnext.regular_files import require_regular
from cnext.runs import results_file, seals

RELATIONS = {
    (True, True): "same input, same output",
    (True, False): "same input only",
    (False, True): "same output only",
    (False, False): "neither",
}
UNMOVED = 1e-12
"""A squared norm of an update below this share of its weights' is rounding."""


@dataclass(frozen=True)
class Updates:
    """The updates of a run. places: (layer, projection, branch) of each of P adapters; products: (P, T, T) float64
    inner products <U_s, U_t>."""

    tasks: list[str]
    places: list[tuple[int, str, str]]
    products: np.ndarray

    @property
    def branches(self) -> list[str]:
        return list(dict.fromkeys(branch for _, _, branch in self.places))

    @property
    def layers(self) -> list[int]:
        return sorted({layer for layer, _, _ in self.places})

    @property
    def projections(self) -> list[str]:
        return list(dict.fromkeys(projection for _, projection, _ in self.places))

    def of(
        self, branch: str | None = None, layers: list[int] | None = None, projection: str | None = None
    ) -> np.ndarray:
        """(P,) bool: the adapters of a branch, in some layers, of a projection; None: all."""
        return np.array(
            [
                branch in (None, b) and (layers is None or n in layers) and projection in (None, p)
                for n, p, b in self.places
            ],
            bool,
        )

    def distance(self, first: int, second: int, chosen: np.ndarray) -> float:
        """The norm of the chosen adapters' difference between two stages, first < second."""
        return float(np.sqrt(max(0.0, self.products[chosen, first:second, first:second].sum())))

    def energies(self, chosen: np.ndarray | None = None) -> np.ndarray:
        """(P', T) squared norms of the updates."""
        products = self.products if chosen is None else self.products[chosen]
        return np.diagonal(products, axis1=1, axis2=2)

    def norms(self) -> np.ndarray:
        """(branches, T, layers, projections) Frobenius norms; NaN where a layer has no such adapter."""
        found = np.full((len(self.branches), len(self.tasks), len(self.layers), len(self.projections)), np.nan)
        for (layer, projection, branch), energy in zip(self.places, self.energies(), strict=True):
            row, column = self.layers.index(layer), self.projections.index(projection)
            found[self.branches.index(branch), :, row, column] = np.sqrt(energy)
        return found

    def cosines(self, chosen: np.ndarray | None = None) -> np.ndarray:
        """(T, T) cosines between the tasks' updates, all chosen adapters as one vector; NaN where one did not move."""
        total = (self.products if chosen is None else self.products[chosen]).sum(0)
        norms = np.sqrt(np.diag(total))
        with np.errstate(divide="ignore", invalid="ignore"):
            return total / np.outer(norms, norms)

    def distances(self) -> np.ndarray:
        """(T + 1, T + 1) norms of the difference of the adapters after two stages; stage 0 is before training."""
        updates = np.pad(self.products.sum(0), ((1, 0), (1, 0)))
        states = updates.cumsum(0).cumsum(1)
        own = np.diag(states)
        return np.sqrt(np.maximum(own[:, None] + own[None, :] - 2 * states, 0))

    def branch_shares(self) -> np.ndarray:
        """(branches, T) share of each branch in the squared norm of each task's update; NaN where nothing moved."""
        energies = np.array([self.energies(self.of(branch)).sum(0) for branch in self.branches])
        return _shares(energies)

    def overlaps(self, chosen: np.ndarray | None = None) -> np.ndarray:
        """(T, T) sum over adapters of min(p_s, p_t), p_t an adapter's share in the squared norm of task t's update."""
        return _overlaps(_shares(self.energies(chosen)))

    def branch_overlaps(self) -> np.ndarray:
        """(T, T) as ``overlaps``, of whole branches."""
        return _overlaps(self.branch_shares())


def _shares(energies: np.ndarray) -> np.ndarray:
    total = energies.sum(0)
    return energies / np.where(total > 0, total, np.nan)


def _overlaps(shares: np.ndarray) -> np.ndarray:
    return np.minimum(shares[:, :, None], shares[:, None, :]).sum(0)


def read(run: Run) -> Updates:
    """The updates of a run from ``checkpoints/<stage>_<task>/adapters.safetensors``.

    Raises:
        Unavailable: a stage's checkpoint is not there, or an update is that of several tasks or of none.
        UserError: a checkpoint cannot be read; names it.
    """
    if problem := _not_of_one_task(run):
        raise Unavailable(f"{run.path}: drift needs each task's own update; {problem}")
    files = _files(run)
    if missing := [file.parent.name for file in files if not file.is_file()]:
        raise Unavailable(
            f"{run.path}: drift needs the checkpoint of every stage, checkpoints/ lacks {', '.join(missing)}; "
            "copy the whole run folder, or run it again"
        )
    from cnext.runs import checkpoint  # imports torch

    for file in files if seals.run_of(run.path) is not None else ():
        results_file.check_stage(file.parent, checkpoint.verified(file))
    named = {_place(name): updates for name, updates in _products(files).items()}
    places = sorted(named)
    return Updates(run.tasks[: len(files)], places, np.stack([named[place] for place in places]))


def _not_of_one_task(run: Run) -> str:
    """Why what a run started from is no update of one task; "" where it is, or the branches started at zero."""
    init = run.results.init
    if init is None:
        return ""
    if not init.tasks:
        held = init.kind != "merged"
        return f"it started from {init.name}, whose branches would count as its first task's" if held else ""
    # The branches hold none of what was merged before them, and of several tasks only the sum.
    if len(init.tasks) == 1 and init.kind != "merged" and not run.config.get("merged"):
        return ""
    return f"it started from {init.name} as the state after {', '.join(init.tasks)}, whose own are not in checkpoints/"


def _files(run: Run) -> list[Path]:
    """The adapters of every stage done."""
    stages = enumerate(run.tasks[: run.last], 1)
    return [run.path / "checkpoints" / f"{stage}_{task}" / "adapters.safetensors" for stage, task in stages]


def has_branches(run: Run) -> bool:
    """Whether the method holds low-rank branches, as far as its first checkpoint is there to say so."""
    first = _files(run)[0]
    if not first.is_file():
        return True
    with _opened([first]) as [file]:
        return any(name.endswith(".A") for name in file.keys())  # noqa: SIM118 (no mapping)


def _place(name: str) -> tuple[int, str, str]:
    """(3, "mlp.up_proj", "image-expert") of "layers.3.mlp.up_proj.image-expert"; layer 0 where there is no number."""
    *path, branch = name.split(".")
    at = next((place for place, part in enumerate(path) if part.isdecimal()), None)
    return (0, ".".join(path), branch) if at is None else (int(path[at]), ".".join(path[at + 1 :]), branch)


@contextmanager
def _opened(files: list[Path]) -> Iterator[list[Any]]:
    """The files for reading, a tensor at a time. Raises UserError where one is damaged."""
    from safetensors import SafetensorError, safe_open

    with ExitStack() as stack:
        opened = []
        for file in files:
            try:
                require_regular(file)
                opened.append(stack.enter_context(safe_open(file, framework="pt")))
            except (OSError, SafetensorError) as error:
                raise UserError(f"{file} is damaged ({error}); copy the run folder again, or run it again") from error
        yield opened


def _products(files: list[Path]) -> dict[str, np.ndarray]:
    """(T, T) inner products of the updates, by the name of the branch in its layer."""
    with _opened(files) as opened:
        names = [set(file.keys()) for file in opened]
        if any(other != names[0] for other in names):
            raise UserError(
                f"{files[0].parents[1]}: the checkpoints hold different adapters; they are of different runs"
            )
        found = {}
        for name in sorted(name.removesuffix(".A") for name in names[0] if name.endswith(".A")):
            a, b = ([file.get_tensor(f"{name}.{half}").double().numpy() for file in opened] for half in "AB")
            found[name] = inner_products(a, b)
        return found


def inner_products(a: list[np.ndarray], b: list[np.ndarray]) -> np.ndarray:
    """(T, T) inner products of the updates U_t = B_t A_t - B_{t-1} A_{t-1}, with B_0 A_0 = 0.

    Args: a: (r, in) of every stage.  b: (out, r) of every stage.
    """
    count = len(a)
    states = np.zeros((count + 1, count + 1))
    for s, t in itertools.product(range(count), repeat=2):
        states[s + 1, t + 1] = ((b[s].T @ b[t]) * (a[s] @ a[t].T)).sum()
    updates = np.diff(np.diff(states, axis=0), axis=1)
    scale = np.diag(states)
    still = np.diag(updates) <= UNMOVED * (scale[1:] + scale[:-1])
    updates[still, :] = updates[:, still] = 0.0
    return updates


def relations(run: Run, found: Updates) -> dict[str, dict[str, float]]:
    """Over the pairs of tasks of each relation: how many, and the mean of each measure of what their updates share."""
    half = len(found.layers) // 2
    shallow, deep = (found.of(layers=part) for part in (found.layers[:half], found.layers[half:]))
    measures = {
        "branches shared": 100 * found.branch_overlaps(),
        "shared": 100 * found.overlaps(),
        "shared, shallow half": 100 * found.overlaps(shallow),
        "shared, deep half": 100 * found.overlaps(deep),
        "cosine": found.cosines(),
        "cosine, shallow half": found.cosines(shallow),
        "cosine, deep half": found.cosines(deep),
    }
    pairs: dict[str, list[tuple[int, int]]] = {relation: [] for relation in RELATIONS.values()}
    reads, writes = ([set(run.modalities(side, task)) for task in found.tasks] for side in ("reads", "writes"))
    for s, t in itertools.combinations(range(len(found.tasks)), 2):
        pairs[RELATIONS[reads[s] == reads[t], writes[s] == writes[t]]].append((s, t))
    return {
        relation: {name: mean_seen(np.array([values[pair] for pair in of])) for name, values in measures.items()}
        | {"pairs": len(of)}
        for relation, of in pairs.items()
        if of
    }
