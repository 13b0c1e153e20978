"""lm-eval as a library: one model in memory, tasks on disk, the answer to every question.

The model is the stock harness's ``HFLM`` with two things changed: logits are taken only where
continuations are scored (a vocabulary of 131072 over a whole context is gigabytes), and nothing is
printed. Log-likelihood batches are padded on the right, where a causal model, its recurrent states
included, does not see the padding: tests/test_eval.py holds that to batch size 1.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import datasets
import torch
from lm_eval import evaluator
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from minipuzzle import progress
from minipuzzle.errors import UserError

METRICS = ("acc", "exact_match")
"""What counts as a right answer: the first of these that a task has."""
BATCH_TOKENS_CPU, BATCH_TOKENS_CUDA = 2**11, 2**16
"""Tokens of a forward pass; on a CPU more are slower (8.4 M model, 2^13: a third longer)."""
BOOTSTRAPS = 100
"""Draws for metrics without a closed error; an accuracy has one, and needs none."""


class Tasks:
    """Questions read once, to be put to several models.

    Args:
        names: tasks or groups, lm-eval's own or from ``folder``.
        folder: where local task files lie; with ``defaults`` unset only these are known, which
            saves the eleven seconds of indexing lm-eval's own.
        defaults: whether lm-eval's own tasks may be asked for.
        limit: questions per task, None for all.

    Raises:
        UserError: a name is not known, or its data cannot be read.
    """

    def __init__(
        self,
        names: Sequence[str],
        *,
        folder: Path | None = None,
        defaults: bool = True,
        limit: int | None = None,
    ) -> None:
        self.limit = limit
        with _quiet():
            manager = TaskManager(
                include_path=None if folder is None else str(folder), include_defaults=defaults
            )
            known = set(manager.all_tasks)
            if strangers := [name for name in names if name not in known]:
                raise UserError(f"lm-eval knows no task {strangers[0]!r}; see `lm-eval ls tasks`")
            self._loaded = _load(manager, names)
        for task in self._loaded["tasks"].values():
            if task.get_config("num_fewshot") is None:
                task.set_config(key="num_fewshot", value=0)
            task.set_fewshot_seed(seed=1234)

    @property
    def names(self) -> list[str]:
        """The tasks that groups stand for, in order."""
        return list(self._loaded["tasks"])

    def answers(
        self, module: Any, tokenizer: Any, *, label: str, batch: int | None = None
    ) -> dict[str, dict[int, float]]:
        """Put all questions to a model: task -> question number -> 1.0 right, 0.0 wrong.

        Args:
            module: a transformers causal language model in eval mode.
            tokenizer: its tokenizer.
            label: what the progress bar says.
            batch: contexts per forward pass; None takes as many as keep the device busy.

        Raises:
            UserError: a task has no accuracy.
        """
        with _quiet():
            scorer = _Scorer(
                pretrained=module,
                tokenizer=tokenizer,
                batch_size=batch or 1,
                softmax_dtype=torch.float32,
            )
            scorer.label, scorer.fixed_batch = label, batch
            result = evaluator.evaluate(
                scorer,
                self._loaded,
                limit=self.limit,
                bootstrap_iters=BOOTSTRAPS,
                log_samples=True,
            )
        return {name: _right(name, result["samples"][name]) for name in self.names}


class _Scorer(HFLM):  # type: ignore[misc]  # lm_eval has no types
    """``HFLM`` that computes logits for continuations only and shows our progress bar."""

    label = ""
    fixed_batch: int | None = None
    _longest = 0
    _bar: progress.Bar | None = None

    def _loglikelihood_tokens(
        self, requests: list[Any], disable_tqdm: bool = True, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        self._longest = max((len(continuation) for _, _, continuation in requests), default=0)
        contexts = {(*context, *continuation[:-1]) for _, context, continuation in requests}
        longest = max(map(len, contexts), default=1)
        if self.fixed_batch is None:
            budget = BATCH_TOKENS_CUDA if self.device.type == "cuda" else BATCH_TOKENS_CPU
            self.batch_size_per_gpu = max(1, budget // longest)
        with progress.bar(self.label, len(contexts), "contexts") as bar:
            self._bar = bar
            scores: list[tuple[float, bool]] = super()._loglikelihood_tokens(
                requests, disable_tqdm=True, override_bs=override_bs
            )
        self._bar = None
        return scores

    def _model_call(self, inps: torch.Tensor, attn_mask: Any = None, labels: Any = None) -> Any:
        """Logits of the last positions, (B, K, V): enough for every continuation of the batch.

        ``HFLM`` counts a continuation's place from the end, so a shorter answer fits. Rows are
        padded with zeros; trailing zeros of the text itself only make K larger than needed.
        """
        assert attn_mask is None and labels is None, "sequence-to-sequence models have no pattern"
        trailing = (inps.flip(1) != 0).cumsum(1).eq(0).sum(1).max()
        keep = min(inps.shape[1], int(trailing) + self._longest)
        with torch.inference_mode():
            logits = self.model(input_ids=inps, use_cache=False, logits_to_keep=keep).logits
        if self._bar is not None:
            self._bar.advance(len(inps))
        return logits


def _load(manager: Any, names: Sequence[str]) -> Any:
    try:
        return manager.load(list(names))
    except (OSError, ConnectionError, datasets.exceptions.DatasetsError) as error:
        first_line = str(error).strip().splitlines()[:1]
        raise UserError(
            f"the data of {', '.join(names)} cannot be read ({'; '.join(first_line)}); "
            "check the network or choose local tasks"
        ) from error


def _right(name: str, samples: Sequence[dict[str, Any]]) -> dict[int, float]:
    metric = next((m for m in METRICS if samples and m in samples[0]), None)
    if metric is None:
        raise UserError(f"task {name!r} has no accuracy; choose tasks with one of: {METRICS}")
    filters = [sample["filter"] for sample in samples]
    return {
        int(sample["doc_id"]): float(sample[metric])
        for sample in samples
        if sample["filter"] == filters[0]
    }


@contextmanager
def _quiet() -> Iterator[None]:
    """No banners, warnings and bars of lm-eval and datasets; errors still raise."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets")]
    levels = [logger.level for logger in loggers]
    bars = datasets.utils.logging.is_progress_bar_enabled()
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    try:
        with (
            mock.patch("lm_eval.api.task.tqdm", lambda items, **_: items),
            mock.patch("lm_eval.api.model.tqdm", lambda items, **_: items),
        ):
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if bars:
            datasets.enable_progress_bars()
