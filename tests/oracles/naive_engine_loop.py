"""One device group's loop, written down as simply as it can be: first come first served, nothing shared, pages without
end. Independent of the simulator, the schedulers and their terms; sizes are in tokens, times in seconds."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Job:
    sent_s: float
    prompt: int
    output: int
    computed: int = 0  # prompt tokens that dispatches so far cover
    promised: int = 0  # output tokens that dispatches so far make
    first_s: float | None = None
    made: int = 0
    finished_s: float | None = None
    queue_s: float | None = None


def run(jobs, step_s, prefill_tokens, max_chunks, max_running):
    """jobs: by sent_s. step_s(decode lengths, chunks) -> seconds. Fills in the jobs' times. Returns seconds busy."""
    unseen, waiting, running = list(jobs), [], []
    dispatches = []  # at most two: the one that runs, and the one behind it
    now, free_at, busy_s = 0.0, 0.0, 0.0
    while unseen or waiting or running:
        if not dispatches and not waiting and not running:
            now = max(now, unseen[0].sent_s)
        while unseen and unseen[0].sent_s <= now:
            waiting.append(unseen.pop(0))
        while len(dispatches) < 2:
            # A prompt of which one token is left goes on as one that decodes does.
            decode = [job for job in running if job.computed >= job.prompt - 1 and job.promised < job.output]
            lengths = [job.prompt + job.promised for job in decode]
            for job in decode:
                job.computed = job.prompt
            chunks, budget = [], prefill_tokens
            room = max_running - sum(1 for job in running if job.promised < job.output)
            for job in [*running, *waiting]:
                if job in waiting:
                    if room == 0 or not budget or len(chunks) == max_chunks:
                        break
                elif job in decode or job.computed == job.prompt or not budget or len(chunks) == max_chunks:
                    continue
                if job in waiting:
                    room -= 1
                    job.queue_s = now - job.sent_s
                size = min(budget, job.prompt - job.computed)
                budget -= size
                job.computed += size
                chunks.append((job, size, job.computed))
            for job, _, _ in chunks:
                if job in waiting:
                    waiting.remove(job)
                    running.append(job)
            makes = decode + [job for job, _, computed in chunks if computed == job.prompt]
            for job in makes:
                job.promised += 1
            if not decode and not chunks:
                break
            seconds = step_s(lengths, [(size, computed) for _, size, computed in chunks])
            busy_s += seconds
            free_at = max(now, free_at) + seconds
            dispatches.append((free_at, makes))
        if not dispatches:
            continue
        now, makes = dispatches.pop(0)
        for job in makes:
            job.made += 1
            job.first_s = now if job.first_s is None else job.first_s
            if job.made == job.output:
                job.finished_s = now
                running.remove(job)
    return busy_s
