"""Easy rows first, and less so in every epoch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs
import numpy as np
import torch

from drivetrain import ConfigError, DataError, Problem, hookimpl, import_object, option, plugin
from drivetrain import Sequential as InTurn
from drivetrain.rng import generator
from drivetrain_plugins.order._lengths import read_rows, row_values

if TYPE_CHECKING:
    from drivetrain import Run


@attrs.frozen(eq=False)
class Faded:
    """Rows sorted by a mixture of how difficult they are and of chance, whose share grows."""

    easier: np.ndarray[Any, Any]  # float64 (N,): the share of rows that are easier
    epochs: float
    noise: float
    seed: int

    @property
    def rows(self) -> int:
        """Return N."""
        return len(self.easier)

    def order(self, epoch: int) -> torch.Tensor:
        """Return int64 (N,)."""
        chance = self.noise + (1 - self.noise) * min(1.0, epoch / self.epochs)
        draws = generator(self.seed, "curriculum", epoch)
        drawn = torch.rand(self.rows, generator=draws, dtype=torch.float64).numpy()
        return torch.from_numpy(np.lexsort((drawn, (1 - chance) * self.easier + chance * drawn)))


@plugin(role="order", example={"epochs": 2}, rows="tokens", companions={"pad": {}})
class Curriculum:
    """Train on easy rows first, and fade to a random order over `epochs` epochs; every row comes once in each.

    Row i of epoch e is sorted by (1 - c) * r + c * u, where r in [0, 1) is the share of rows that are easier than i, u
    in [0, 1) is drawn from seed and epoch, and the share of chance is c = noise + (1 - noise) * min(1, e / epochs).
    Rows that are equally difficult come in random order. Ordering by difficulty is Bengio et al., "Curriculum learning"
    (ICML 2009); length as difficulty, measured by its rank, is Platanios et al., "Competence-based curriculum learning
    for neural machine translation" (NAACL 2019), who sample easy rows repeatedly where this sorts them.
    """

    field: str = option("input_ids", help="field whose length is the difficulty, or that holds it as a number")
    function: str | None = option(None, help='a row\'s difficulty as a function of it, as "package.module:name"')
    epochs: float = option(3, gt=0, help="epochs after which the order is random")
    noise: float = option(0.1, ge=0, le=1, help="share of chance in the first epoch's order")

    @hookimpl
    def build_sampler(self, run: Run, split: str) -> Faded | InTurn:
        """Measure and sort what is trained on; evaluate as the rows come."""
        if split != "train":
            return InTurn(len(run.datasets[split]))
        values = self._difficulty(run, split).astype(np.float64)
        if len(wrong := np.flatnonzero(np.isnan(values))):
            raise DataError(f"curriculum: {split} row {wrong[0]}: a difficulty must be a number. Received: nan")
        easier = np.searchsorted(np.sort(values), values) / len(values)
        return Faded(easier, self.epochs, self.noise, run.settings.seed)

    def _difficulty(self, run: Run, split: str) -> np.ndarray[Any, Any]:
        if self.function is None:
            return row_values(run, split, self.field, plugin="curriculum")
        function = import_object(self.function, plugin="curriculum")

        def score(row: Any) -> float:
            value = function(row)
            try:
                return float(value)
            except (TypeError, ValueError) as error:
                what = f"curriculum: {self.function} must return a number for a row"
                raise ConfigError([Problem(what, repr(value)[:80])]) from error

        return read_rows(run, split, score)
