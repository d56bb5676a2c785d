"""Roofline estimate of the branches' cost on a GPU: ``python bench/roofline.py``.

Time of forward and backward of LLaMA2-13B's linear layers with branches, divided by that of the frozen layers, in
bfloat16 with dropout: frozen products at the measured rate of a card (an H200; an H100 is assumed to be as fast), all
other bytes at 0.88 of its measured bandwidth. Launches are not counted, and kernels do not reach the roofline: on an
H200 the branches added 1.8 times as much as predicted. These are predictions; measurements are in bench/results.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

ROWS, RANK, LIVE, WIDTH = 14080, 32, 24, 2
"""Rows of x, total rank, rank of the trained branches, bytes per element."""
SHAPES = {"q, k, v": (5120, 5120, 3), "o": (5120, 5120, 1), "gate, up": (5120, 13824, 2), "down": (13824, 5120, 1)}
"""Input width, output width, and the number of layers that read the same input."""


@dataclass
class Card:
    """Bytes per second of memory passes, operations per second of products, relative overhead of an added product."""

    bandwidth: float
    flops: Callable[[int], float]
    added: float


CARDS = {
    "H100": Card(3.0e12, lambda inner: 0.76e15 if inner > 8192 else 0.80e15, 0.010),
    "H200": Card(3.9e12, lambda inner: 0.758e15 if inner > 8192 else 0.829e15, 0.007),
}


@dataclass
class Bytes:
    """Memory traffic besides the frozen products: multiples of x, of y, and of float32 sums (rows, rank)."""

    x: float
    y: float
    sums: float = 0
    added: int = 0  # products that add to what is in their output


def separate(dropped_stored: bool) -> Callable[[int], Bytes]:
    """Each layer alone, the branches' products added after the frozen one; dropout in a separate pass or fused."""
    x = 3 + 4 + 3 if dropped_stored else 1 + 2 + 1  # h, dX and dA
    return lambda layers: Bytes(x * layers, (2 + 2) * layers)


def branches_first(together: bool, one_pass: bool, out: int) -> Callable[[int], Bytes]:
    """The branches written first. together: h, dX and dA once for all layers; one_pass: dh and dB from one read."""

    def moved(layers: int) -> Bytes:
        passes = 1 if together else layers
        partial = 2 * (out / 512) * WIDTH if one_pass else 0  # float32, written and read
        return Bytes(3 * passes, (1 + (1 if one_pass else 2)) * layers, partial * layers, 2 * layers)

    return moved


def ratio(card: Card, shape: tuple[int, int, int], design: Callable[[int], Bytes]) -> tuple[float, float]:
    """Seconds of the frozen layers, forward and backward, and the seconds that a design adds."""
    inner, out, layers = shape
    operations = 2 * ROWS * inner * out
    frozen = layers * (operations / card.flops(inner) + operations / card.flops(out))
    moved = design(layers)
    large = (moved.x * inner + moved.y * out) * ROWS * WIDTH
    small = moved.sums * ROWS * RANK * WIDTH
    # Autograd adds the frozen layers' dX up, which one chain of products does not.
    adds = (layers - 1) * 3 * ROWS * inner * WIDTH / card.bandwidth
    saved = adds if moved.x < 3 * layers and layers > 1 else 0.0
    extra = (large + small) / card.bandwidth + card.added * frozen * (moved.added > 0)
    return frozen + adds, extra - saved


def main() -> None:
    print("predicted time of forward and backward, relative to the frozen layers")
    for name, card in CARDS.items():
        designs: dict[str, Callable[[int], Callable[[int], Bytes]]] = {
            "branches added after, dropped x stored": lambda out: separate(True),
            "branches added after, dropout fused": lambda out: separate(False),
            "branches first, each layer alone, dY read twice": lambda out: branches_first(False, False, out),
            "branches first, each layer alone": lambda out: branches_first(False, True, out),
            "branches first, layers that share x together": lambda out: branches_first(True, True, out),
        }
        print(f"\n{name:48}" + "".join(f"{shape:>10}" for shape in (*SHAPES, "all seven")))
        for what, design in designs.items():
            times = [ratio(card, shape, design(shape[1])) for shape in SHAPES.values()]
            whole = sum(frozen for frozen, _ in times), sum(extra for _, extra in times)
            cells = "".join(f"{1 + extra / frozen:10.2f}" for frozen, extra in (*times, whole))
            print(f"{what:48}{cells}")


if __name__ == "__main__":
    main()
