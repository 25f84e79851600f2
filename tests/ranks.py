"""Ranks of one gloo group, in processes that stay for many tests."""

import io
import multiprocessing
import traceback

import torch
import torch.distributed as dist


class Processes:
    """Ranks that run functions of test files, all at once, until closed."""

    def __init__(self, world_size, folder):
        # They begin where the imports below have been made, which would take most of their time otherwise.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["tests.small_model", "engram_lm.training.run", "engram_lm.adapt"])
        self.world_size, self.results = world_size, context.Queue()
        self.jobs = [context.SimpleQueue() for _ in range(world_size)]
        self.processes = [
            context.Process(target=_serve, args=(rank, world_size, str(folder), self.jobs[rank], self.results))
            for rank in range(world_size)
        ]
        for process in self.processes:
            process.start()

    def run(self, function, *arguments, numbered=True):
        """What ``function(rank, *arguments)`` returned, by rank; fails with what it raised.

        Where it is not ``numbered``, the function is not told its rank.
        """
        for rank, jobs in enumerate(self.jobs):
            jobs.put((function, (rank, *arguments) if numbered else arguments))
        found = dict(self.results.get(timeout=100) for _ in self.jobs)
        found = [torch.load(io.BytesIO(found[rank]), weights_only=False) for rank in range(self.world_size)]
        problems = [one for one in found if isinstance(one, str) and one.startswith("Traceback")]
        assert not problems, "\n".join(problems)
        return found

    def close(self):
        for jobs in self.jobs:
            jobs.put(None)
        for process in self.processes:
            process.join(20)
            process.kill()


def _serve(rank, world_size, folder, jobs, results):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world_size)
    while (job := jobs.get()) is not None:
        function, arguments = job
        try:
            result = function(*arguments)
        except BaseException:  # whatever it is, or whoever waits for the answer waits in vain
            result = traceback.format_exc()
        file = io.BytesIO()
        torch.save(result, file)
        results.put((rank, file.getvalue()))
    dist.destroy_process_group()
