"""Where the chunks of a trial end: equal parts, by examples, of what plain TRL would feed it."""

from __future__ import annotations

from rapidfire_policies.wording import counted


def examples_after(examples_per_epoch: int, examples_per_step: int, steps: int) -> int:
    """The examples consumed after a number of optimizer steps.

    An epoch has `ceil(examples_per_epoch / examples_per_step)` steps; its last one is smaller where the division
    leaves a rest.

    Args:
        examples_per_epoch: Examples of one pass over the training data.
        examples_per_step: Examples of a full optimizer step: batch size times accumulation steps.
        steps: Optimizer steps done.

    Raises:
        ValueError: A size is below 1 or `steps` below 0.

    >>> [examples_after(10, 4, steps) for steps in range(7)]
    [0, 4, 8, 10, 14, 18, 20]
    """
    _check(examples_per_epoch=examples_per_epoch, examples_per_step=examples_per_step)
    if steps < 0:
        raise ValueError(f"`steps` must be >= 0, got {steps}.")
    epochs, rest = divmod(steps, -(-examples_per_epoch // examples_per_step))
    return epochs * examples_per_epoch + rest * examples_per_step


def chunk_boundaries(examples_per_epoch: int, examples_per_step: int, max_steps: int, chunks: int) -> tuple[int, ...]:
    """The optimizer step at which each chunk of a trial ends.

    Chunk `k` ends with the first step after which at least `k / chunks` of all the examples the trial will see have
    been consumed, compared in integers. Where one large step spans several of these marks, a chunk ends one step
    later (near the end of the trial: earlier), so that each holds at least one step.

    Args:
        examples_per_epoch: Examples of one pass over the training data.
        examples_per_step: Examples of a full optimizer step: batch size times accumulation steps.
        max_steps: Optimizer steps of the whole trial.
        chunks: Chunks of the whole trial.

    Returns:
        `chunks` steps, strictly increasing, the last one `max_steps`.

    Raises:
        ValueError: A size is below 1, or there are fewer steps than chunks.

    >>> chunk_boundaries(examples_per_epoch=10, examples_per_step=4, max_steps=6, chunks=4)
    (2, 3, 5, 6)
    """
    _check(
        examples_per_epoch=examples_per_epoch, examples_per_step=examples_per_step, max_steps=max_steps, chunks=chunks
    )
    if max_steps < chunks:
        raise ValueError(
            f"`chunks` must be <= the trial's {counted(max_steps, 'optimizer step')}, got {chunks}. Use fewer chunks, "
            "or give the trial more steps: more examples or epochs, a smaller batch or less gradient accumulation."
        )
    total = examples_after(examples_per_epoch, examples_per_step, max_steps)
    steps_per_epoch = -(-examples_per_epoch // examples_per_step)
    boundaries: list[int] = []
    for k in range(1, chunks + 1):
        epochs, rest = divmod(-(-k * total // chunks), examples_per_epoch)
        step = epochs * steps_per_epoch - (-rest // examples_per_step)
        earliest = boundaries[-1] + 1 if boundaries else 1
        boundaries.append(min(max(step, earliest), max_steps - (chunks - k)))
    return tuple(boundaries)


def generation_boundaries(
    batches_per_epoch: int, accumulation: int, generate_every: int, max_steps: int, chunks: int
) -> tuple[int, ...]:
    """Where the chunks of a trial end that trains on its own rollouts: where it has used up those it has made.

    Such a trainer makes rollouts every `generate_every` batches and trains on them batch by batch. A chunk ends with
    the first step at such a place after which at least `k / chunks` of all batches have been trained; the last with the
    last step.

    Args:
        batches_per_epoch: Batches of one pass over the prompts, repetitions included.
        accumulation: Batches of an optimizer step; fewer at an epoch's end where the division leaves a rest.
        generate_every: Batches between two rollouts.
        max_steps: Optimizer steps of the whole trial.
        chunks: Chunks of the whole trial.

    Returns:
        `chunks` steps, strictly increasing, the last one `max_steps`.

    Raises:
        ValueError: A size is below 1, or there are fewer such places than chunks.

    >>> generation_boundaries(batches_per_epoch=16, accumulation=1, generate_every=4, max_steps=16, chunks=3)
    (8, 12, 16)
    """
    _check(
        batches_per_epoch=batches_per_epoch,
        accumulation=accumulation,
        generate_every=generate_every,
        max_steps=max_steps,
        chunks=chunks,
    )
    used = [examples_after(batches_per_epoch, accumulation, step) for step in range(max_steps + 1)]
    places = [step for step in range(1, max_steps) if used[step] % generate_every == 0] + [max_steps]
    if len(places) < chunks:
        raise ValueError(
            f"`chunks` must be <= the {counted(len(places), 'time')} a trial makes rollouts, got {chunks}. Use fewer "
            "chunks, or more steps; a chunk ends only where all rollouts have been trained on "
            "(`steps_per_generation` x `num_iterations` batches)."
        )
    boundaries: list[int] = []
    first = 0
    for k in range(1, chunks + 1):
        last = len(places) - (chunks - k)  # leaves a place for each chunk to come
        while first < last - 1 and used[places[first]] * chunks < k * used[max_steps]:
            first += 1
        boundaries.append(places[first])
        first += 1
    return tuple(boundaries)


def _check(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"`{name}` must be >= 1, got {size}.")
