"""`SameData`: finds workers that read the same where they are to read different parts, or the other way round."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from raytrainer.data.first_batches import of_other_datasets, read_alike, read_apart
from raytrainer.errors import DataError
from raytrainer.metric_messages import MetricReport, ReadSample

__all__ = ["SameData"]

log = logging.getLogger("raytrainer")


class SameData:
    """Compares what workers have read first from loaders that share data out in ways of their own."""

    def __init__(self) -> None:
        self._said: set[str] = set()

    def check(self, reports: Sequence[MetricReport]) -> None:
        """Take up what workers report, by rank.

        Raises:
            DataError: Workers that compute each batch together have read different ones.
        """
        for loader in sorted({sample.loader for report in reports for sample in report.reads} - self._said):
            samples: list[ReadSample | None] = [
                next((sample for sample in report.reads if sample.loader == loader), None) for report in reports
            ]
            apart = read_apart(samples)
            if apart is not None:
                one, other, leaf = apart
                raise DataError(
                    f"ranks {one} and {other} are to compute each batch of the {loader} loader together, and have read "
                    f"different ones: batch{leaf} differs. This loader's data is not dealt out for you: give both the "
                    f"same, by rt.data_part() rather than by the rank."
                )
            others = of_other_datasets(samples)
            if others is not None:
                self._said.add(loader)
                log.warning(
                    "Ranks %d and %d have different datasets in the %s loader. Its samples are dealt out by their "
                    "numbers, so that of each one's dataset only a part is read. Give every worker the whole dataset; "
                    "or, where each has its own part already (split_dataset_by_node, a Subset by rank), say "
                    "use_distributed_sampler=False.", *others, loader,
                )  # fmt: skip
                continue
            found = read_alike(samples)
            if found is None:
                continue
            self._said.add(loader)
            one, other, leaf = found
            sample = samples[other]
            assert sample is not None
            log.warning(
                "Workers read the same data from the %s loader: in the first %d batches, batch%s is the same on ranks "
                "%d and %d, so samples count several times, and more workers bring nothing. This loader's data is not "
                "dealt out for you. So that each worker reads its part: %s.",
                loader, sample.batches, leaf, one, other, sample.advice,
            )  # fmt: skip
