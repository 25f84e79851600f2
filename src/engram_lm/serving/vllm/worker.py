"""vLLM's worker, which also tells the scheduler whose rows could not be read."""

import copy
from typing import Any

import torch
from vllm.distributed import get_tp_group
from vllm.platforms import current_platform
from vllm.v1.outputs import AsyncModelRunnerOutput, ModelRunnerOutput

from engram_lm.serving.vllm.lost_rows import LOST, LostRows, collecting

if current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker as Worker
else:
    from vllm.v1.worker.gpu_worker import Worker


class EngramWorker(Worker):
    """The worker of the platform for models with memory."""

    _lost: LostRows | None = None  # from the forward pass to the sampling, which vLLM calls apart

    def execute_model(self, scheduler_output: Any) -> Any:
        """Run a forward pass, and take note of the rows that it could not read."""
        with collecting() as lost:
            output = super().execute_model(scheduler_output)
        self._lost = agreed(lost)
        return self._with_note(output)

    def sample_tokens(self, grammar_output: Any) -> Any:
        """Sample what the forward pass gave."""
        # The first request for log-probabilities compiles a function; without it, as on a full disk, it runs as it is.
        with torch._dynamo.config.patch(suppress_errors=True):
            return self._with_note(super().sample_tokens(grammar_output))

    def execute_dummy_batch(self) -> None:
        """Run along with other replicas, for nobody."""
        with collecting():
            super().execute_dummy_batch()

    def _with_note(self, output: Any) -> Any:
        if self._lost is None or output is None:
            return output
        lost, self._lost = self._lost, None
        return _LaterOutput(output, lost) if isinstance(output, AsyncModelRunnerOutput) else _noted(output, lost)


class _LaterOutput(AsyncModelRunnerOutput):
    """Output that is still on its way from a GPU."""

    def __init__(self, output: AsyncModelRunnerOutput, lost: LostRows) -> None:
        self.output, self.lost = output, lost

    def get_output(self) -> ModelRunnerOutput:
        return _noted(self.output.get_output(), self.lost)


def _noted(output: ModelRunnerOutput, lost: LostRows) -> ModelRunnerOutput:
    output = copy.copy(output)
    setattr(output, LOST, lost)
    return output


def agreed(lost: LostRows) -> LostRows | None:
    """Put together what all ranks could not read, since one of them speaks for all; None where there is nothing."""
    group = get_tp_group()
    if group.world_size == 1:
        return lost if lost.requests else None
    any_lost = torch.tensor([len(lost.requests)])
    torch.distributed.all_reduce(any_lost, group=group.cpu_group)
    if not any_lost.item():
        return None
    everywhere: list[Any] = [None] * group.world_size
    torch.distributed.all_gather_object(everywhere, lost, group=group.cpu_group)
    for other in everywhere:
        lost.merge(other)
    return lost
