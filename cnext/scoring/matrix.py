"""Score matrix of a run and the metrics of continual learning computed from it. Standard library only.

R[t][i] is the score (percent) on task i after stage t, both counted from 1 in training order; R[0][i] is zero-shot.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from decimal import ROUND_HALF_UP, Decimal
from math import fsum, isclose, isfinite, isnan, nan

from cnext.errors import UserError
from cnext.scoring.base import ERROR_TYPES

IDENTITY_TOLERANCE = 1e-6
"""Tolerance of the two identities that ``metrics`` checks, in percent: float64 rounding."""

FORMULAS: dict[str, str] = {
    "avg_acc": "(1/T) Σ_i R[T][i]; divisor T",
    "new_acc": "(1/T) Σ_i R[i][i]; divisor T",
    "maa": "(1/T) Σ_t a_t with the stage averages a_t = (1/t) Σ_{i<=t} R[t][i]; divisor T",
    "forgetting": "(1/(T-1)) Σ_{i<T} (R[i][i] - R[T][i]) = -bwt; divisor T-1; the paper's form, and Avalanche's",
    "forgetting_max": "(1/(T-1)) Σ_{i<T} (max_{i<=l<T} R[l][i] - R[T][i]); divisor T-1; Chaudhry et al. 2018; equal to "
    "forgetting_peak (Mammoth) unless a task is best after the last stage",
    "forgetting_peak": "(1/(T-1)) Σ_{i<T} (max_{i<=l<=T} R[l][i] - R[T][i]); divisor T-1, never negative; Mammoth",
    "bwt": "(1/(T-1)) Σ_{i<T} (R[T][i] - R[i][i]) = -forgetting; divisor T-1; GEM",
    "fwt": "(1/(T-1)) Σ_{i>1} (R[i-1][i] - R[0][i]), each task's score right before its own stage minus zero-shot; "
    "divisor T-1; GEM, with zero-shot as the base",
    "transfer": "(1/(T-1)) Σ_{i>1} (1/(i-1)) Σ_{1<=t<i} R[t][i]; divisor T-1; scores before the task's own stage; ZSCL",
    "worst_acc": "min_i R[T][i]; no divisor",
    "worst_forgetting": "max_{i<T} (R[i][i] - R[T][i]); no divisor",
    "recovery": "Σ_t Σ_{i<t} max(0, R[t][i] - R[t-1][i]); a sum, no divisor",
    "avg_acc_text": "mean of R[T][i] over the tasks i that write text; divisor their number",
    "avg_acc_image": "mean of R[T][i] over the tasks i that write images; divisor their number",
    "forgetting_text": "mean of R[i][i] - R[T][i] over the tasks i < T that write text; divisor their number",
    "forgetting_image": "mean of R[i][i] - R[T][i] over the tasks i < T that write images; divisor their number",
    "forgetting_intermodal": "mean of R[t-1][i] - R[t][i] over i < t where tasks t and i share no output modality; "
    "divisor the number of these pairs",
    "forgetting_intramodal": "mean of R[t-1][i] - R[t][i] over i < t where tasks t and i share an output modality; "
    "divisor the number of these pairs",
    "avg_hal": "(1/(T-1)) Σ_{i<T} (HAL[T][i] - HAL[i][i]), shares of all test samples; divisor T-1",
    "avg_iuf": "(1/(T-1)) Σ_{i<T} (IUF[T][i] - IUF[i][i]), shares of all test samples; divisor T-1",
    "avg_oth": "(1/(T-1)) Σ_{i<T} (OTH[T][i] - OTH[i][i]), shares of all test samples; divisor T-1",
}
"""Each metric's formula and divisor. T is the number of stages done, which is all tasks in a finished run."""

REFERENCE_FORMULAS: dict[str, str] = {
    "fwt_chance": "(1/(T-1)) Σ_{i>1} (R[i-1][i] - b_i), b_i chance; divisor T-1; GEM",
    "forgetting_relative": "(100/(T-1)) Σ_{i<T} (R[i][i] - R[T][i]) / (R[i][i] - b_i), b_i chance; divisor T-1; CLiMB",
    "transfer_relative": "(100/T) Σ_i (R[i][i] - S_i) / (S_i - b_i), S_i trained alone, b_i chance; divisor T; CLiMB",
    "intransigence": "(1/T) Σ_i (J_i - R[i][i]), J_i joint training; divisor T; Chaudhry et al. 2018",
    "omega": "(1/T) Σ_t a_t / ((1/t) Σ_{i<=t} J_i), a_t as in maa, J_i joint training; divisor T; Hayes et al. 2018",
    "zero_shot_retention": "(1/K) Σ_k (H[T][k] - H[0][k]) over K held-out sets, at the end and zero-shot; divisor K",
}
"""Metrics that need scores from outside the matrix."""


def without_repeats(names: Iterable[str], *values: Mapping[str, float | None]) -> list[str]:
    """The metrics to show: not bwt beside forgetting, forgetting_peak only where it differs from forgetting_max."""
    same = all(of.get("forgetting_peak") == of.get("forgetting_max") for of in values)
    return [name for name in names if name != "bwt" and not (same and name == "forgetting_peak")]


_ERROR_METRICS = dict(zip(("avg_hal", "avg_iuf", "avg_oth"), ERROR_TYPES, strict=True))


class ScoreMatrix:
    """R[t][i] for T tasks, indexed from 0: ``matrix[t, i]`` is the score on task i after training task t.

    NaN where not evaluated, never 0.
    """

    def __init__(self, size: int) -> None:
        self._rows = [[nan] * size for _ in range(size)]

    @classmethod
    def from_rows(cls, rows: Sequence[Sequence[float | None]]) -> ScoreMatrix:
        """The matrix of JSON rows, null where not evaluated. An unfinished run may leave out the last rows.

        Raises:
            UserError: a row of another length, too many rows, or a value that is no finite number.
        """
        matrix = cls(len(rows[0]) if rows else 0)
        if len(rows) > len(matrix) or any(len(row) != len(matrix) for row in rows):
            raise UserError(
                f"expected a score matrix of at most {len(matrix)} rows of {len(matrix)} scores, "
                f"got rows of {', '.join(str(len(row)) for row in rows)}"
            )
        for t, row in enumerate(rows):
            for i, value in enumerate(row):
                if value is not None:
                    matrix.set(t, i, value)
        return matrix

    def to_rows(self) -> list[list[float | None]]:
        """The matrix as JSON rows, None where not evaluated."""
        return [[None if isnan(value) else value for value in row] for row in self._rows]

    def set(self, t: int, i: int, value: float) -> None:
        """Enter the score on task i after training task t.

        Raises:
            UserError: the value is no finite number.
        """
        if isinstance(value, bool) or not isinstance(value, int | float) or not isfinite(value):
            raise UserError(f"expected a finite score for task {i} after stage {t} (or null in JSON), got {value!r}")
        if not (0 <= t < len(self) and 0 <= i < len(self)):
            raise IndexError(f"({t}, {i}) is outside a score matrix of {len(self)} tasks")
        self._rows[t][i] = float(value)

    def __getitem__(self, index: tuple[int, int]) -> float:
        t, i = index
        return self._rows[t][i]

    def __len__(self) -> int:
        return len(self._rows)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ScoreMatrix) and self.to_rows() == other.to_rows()

    __hash__ = None  # pyright: ignore[reportAssignmentType]  (Python's own way to say that there is none)

    @property
    def stages_done(self) -> int:
        """The last stage that is evaluated on every task up to its own. Earlier stages may have gaps."""
        whole = (t for t, row in enumerate(self._rows, 1) if not any(isnan(value) for value in row[:t]))
        return max(whole, default=0)

    def stage_averages(self) -> list[float]:
        """a_t = (1/t) Σ_{i<=t} R[t][i] for every stage done; NaN where one has a gap."""
        return [fsum(self._rows[t][: t + 1]) / (t + 1) for t in range(self.stages_done)]

    def drops(self, stage: int) -> list[float]:
        """R[i][i] - R[t][i] of the tasks i learnt before a stage, t = stage + 1 counted from 1."""
        return [self[i, i] - self[stage, i] for i in range(stage)]

    def stage_forgetting(self) -> list[float]:
        """f_t = (1/(t-1)) Σ_{i<t} (R[i][i] - R[t][i]) for every stage done; NaN for the first and at gaps."""
        return [fsum(self.drops(t)) / t if t else nan for t in range(self.stages_done)]

    def changes(self) -> list[tuple[int, int, float]]:
        """(t, i, R[t][i] - R[t-1][i]) for every stage t done and the tasks i learnt before it; NaN at gaps."""
        return [(t, i, self[t, i] - self[t - 1, i]) for t in range(1, self.stages_done) for i in range(t)]


def metrics(
    matrix: ScoreMatrix,
    zero_shot: Sequence[float | None] | None = None,
    error_matrices: Mapping[str, ScoreMatrix] | None = None,
    writes: Sequence[Sequence[str]] | None = None,
    before_learnt: Sequence[float | None] | None = None,
) -> dict[str, float | None]:
    """Every metric of ``FORMULAS`` over the stages done; None where it is undefined or a score it needs is missing.

    Args:
        matrix: scores in percent.
        zero_shot: R[0], in training order, for ``fwt``.
        error_matrices: the share of each of ``ERROR_TYPES`` in percent of all test samples, in the same layout.
        writes: the output modalities of each task, in training order.
        before_learnt: ``R[i-1][i]`` of each task, for ``fwt``, where they are not in the matrix.

    Returns:
        One entry for every key of ``FORMULAS``.

    Raises:
        UserError: the error shares of a cell do not add up to 100 minus its score.
    """
    result: dict[str, float | None] = dict.fromkeys(FORMULAS)
    done = matrix.stages_done
    if done == 0:
        return result
    last = done - 1
    final = [matrix[last, i] for i in range(done)]
    new = [matrix[i, i] for i in range(done)]
    drops = matrix.drops(last)

    result["avg_acc"] = _mean(final)
    result["new_acc"] = _mean(new)
    result["maa"] = _mean(matrix.stage_averages())
    result["forgetting"] = _mean(drops)
    result["forgetting_max"] = _mean([_max([matrix[t, i] for t in range(i, last)]) - final[i] for i in range(last)])
    result["forgetting_peak"] = _mean([_max([matrix[t, i] for t in range(i, done)]) - final[i] for i in range(last)])
    result["bwt"] = _mean([-drop for drop in drops])
    result["transfer"] = _mean([fsum(matrix[t, i] for t in range(i)) / i for i in range(1, done)])
    result["worst_acc"] = min(final)
    result["worst_forgetting"] = _max(drops) if drops else None
    changes = matrix.changes()
    result["recovery"] = fsum(_max([0.0, change]) for _, _, change in changes)
    if zero_shot is not None:
        result["fwt"] = _forward_transfer(matrix, zero_shot, done, before_learnt)
    if writes is not None:
        for modality in ("text", "image"):
            result[f"avg_acc_{modality}"] = _mean([final[i] for i in range(done) if modality in writes[i]])
            result[f"forgetting_{modality}"] = _mean([drops[i] for i in range(last) if modality in writes[i]])
        between = [-change for t, i, change in changes if set(writes[t]).isdisjoint(writes[i])]
        within = [-change for t, i, change in changes if not set(writes[t]).isdisjoint(writes[i])]
        result["forgetting_intermodal"], result["forgetting_intramodal"] = _mean(between), _mean(within)

    if last:
        average, learnt, found = (fsum(values) / len(values) for values in (final, new, drops))
        expected = done / last * (learnt - average)
        assert isnan(found) or isclose(found, expected, abs_tol=IDENTITY_TOLERANCE), (found, expected)
    if error_matrices is not None:
        result |= _error_growth(matrix, error_matrices, last)
    return _defined(result)


def reference_metrics(
    matrix: ScoreMatrix,
    joint: Sequence[float] | None = None,
    single: Sequence[float] | None = None,
    chance: Sequence[float] | None = None,
    held_out: tuple[Sequence[float], Sequence[float]] | None = None,
) -> dict[str, float | None]:
    """Every metric of ``REFERENCE_FORMULAS`` over the stages done; None where it is undefined or an input is missing.

    Args:
        matrix: scores in percent.
        joint, single, chance: each task's score after joint training, after training on it alone, and by chance, in
            training order.
        held_out: scores on sets outside the sequence, zero-shot and at the end.

    Returns:
        One entry for every key of ``REFERENCE_FORMULAS``.
    """
    result: dict[str, float | None] = dict.fromkeys(REFERENCE_FORMULAS)
    done = matrix.stages_done
    new = [matrix[i, i] for i in range(done)]
    if chance is not None:
        result["fwt_chance"] = _forward_transfer(matrix, chance, done)
        lost = [100 * _ratio(new[i] - matrix[done - 1, i], new[i] - chance[i]) for i in range(done - 1)]
        result["forgetting_relative"] = _mean(lost)
        if single is not None:
            gained = [100 * _ratio(new[i] - single[i], single[i] - chance[i]) for i in range(done)]
            result["transfer_relative"] = _mean(gained)
    if joint is not None:
        result["intransigence"] = _mean([joint[i] - new[i] for i in range(done)])
        averages = enumerate(matrix.stage_averages(), 1)
        result["omega"] = _mean([_ratio(average, fsum(joint[:t]) / t) for t, average in averages])
    if held_out is not None:
        before, after = held_out
        result["zero_shot_retention"] = _mean([end - start for start, end in zip(before, after, strict=True)])
    return _defined(result)


def points(value: float, sign: str = "") -> str:
    """A figure in percent with two decimals, halves rounded away from zero as in print. sign "+" shows a plus."""
    rounded = Decimal(repr(round(value, 9))).quantize(Decimal("0.01"), ROUND_HALF_UP)
    return f"{rounded or abs(rounded):{sign}}"


def _mean(values: Sequence[float]) -> float | None:
    return fsum(values) / len(values) if values else None


def _max(values: Sequence[float]) -> float:
    """The largest value; NaN where one of them is, which ``max`` may overlook."""
    return max(values, key=lambda value: (isnan(value), value))


def _ratio(part: float, whole: float) -> float:
    """part / whole; NaN where whole is not positive, as for a task that was learnt no better than by chance."""
    return part / whole if whole > 0 else nan


def _defined(result: dict[str, float | None]) -> dict[str, float | None]:
    return {name: None if value is None or isnan(value) else value for name, value in result.items()}


def _forward_transfer(
    matrix: ScoreMatrix,
    zero_shot: Sequence[float | None],
    done: int,
    before_learnt: Sequence[float | None] | None = None,
) -> float | None:
    measured = before_learnt or [None] * done
    ahead = [matrix[i - 1, i] if (apart := measured[i]) is None else apart for i in range(1, done)]
    pairs = [(score, nan if (base := zero_shot[i]) is None else base) for i, score in enumerate(ahead, 1)]
    if any(isnan(score) or isnan(base) for score, base in pairs):
        return None
    return _mean([score - base for score, base in pairs])


def _error_growth(matrix: ScoreMatrix, errors: Mapping[str, ScoreMatrix], last: int) -> dict[str, float | None]:
    cells = [(t, i) for i in range(last) for t in (i, last)]
    if not cells or any(isnan(known[cell]) for known in (matrix, *errors.values()) for cell in cells):
        return dict.fromkeys(_ERROR_METRICS)
    for t, i in cells:
        total = fsum(errors[kind][t, i] for kind in ERROR_TYPES)
        if not isclose(total, 100.0 - matrix[t, i], abs_tol=IDENTITY_TOLERANCE):
            raise UserError(
                f"expected the error shares of task {i + 1} after stage {t + 1} to add up to 100 minus its score, "
                f"{100.0 - matrix[t, i]:.6f}, got {total:.6f}; compute scores and shares of the same answers"
            )
    growth: dict[str, float | None] = {
        name: _mean([errors[kind][last, i] - errors[kind][i, i] for i in range(last)])
        for name, kind in _ERROR_METRICS.items()
    }
    forgetting = fsum(matrix[i, i] - matrix[last, i] for i in range(last)) / last
    total = fsum(value or 0.0 for value in growth.values())
    assert isclose(total, forgetting, abs_tol=2 * IDENTITY_TOLERANCE), (growth, forgetting)
    return growth
