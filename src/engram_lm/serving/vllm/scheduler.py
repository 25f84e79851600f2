"""vLLM's scheduler, which also ends requests whose rows could not be read, each with the reason."""

from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutputs, FinishReason
from vllm.v1.outputs import ModelRunnerOutput

from engram_lm.serving.vllm.lost_rows import LOST, LostRows


def make_scheduler(**options: Any) -> Scheduler:
    """Make the scheduler that vLLM's configuration asks for; vLLM calls this where it expects a class."""
    config = options["vllm_config"].scheduler_config
    return (_AsyncScheduler if config.async_scheduling else _Scheduler)(**options)


class _EndsRequests:
    """What both schedulers of vLLM do besides."""

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        """Take the tokens of a step; requests whose rows were lost end without those of this step."""
        scheduler: Any = super()
        lost: LostRows | None = getattr(model_runner_output, LOST, None)
        if lost is None:
            updated: dict[int, EngineCoreOutputs] = scheduler.update_from_output(scheduler_output, model_runner_output)
            return updated
        ended = self._forget(lost, model_runner_output)
        # Requests in this set are ended with an error, whatever it is called.
        self.encoder_cache_mismatch_reqs: set[str]
        self.encoder_cache_mismatch_reqs |= ended
        for request in ended & model_runner_output.req_id_to_index.keys():
            if model_runner_output.sampled_token_ids:
                model_runner_output.sampled_token_ids[model_runner_output.req_id_to_index[request]] = []
            model_runner_output.prompt_logprobs_dict.pop(request, None)
            model_runner_output.prompt_token_id_logprobs_dict.pop(request, None)
        updated = scheduler.update_from_output(scheduler_output, model_runner_output)
        for client in updated.values():
            for output in client.outputs:
                if output.request_id in ended and output.finish_reason == FinishReason.ERROR:
                    output.stop_reason = lost.reason
        return updated

    def _forget(self, lost: LostRows, model_runner_output: ModelRunnerOutput) -> set[str]:
        """Take what was computed without rows out of the prefix cache; return whose requests it spoils."""
        scheduler: Any = self
        manager, groups = scheduler.kv_cache_manager, scheduler.kv_cache_config.kv_cache_groups
        sizes = [group.kv_cache_spec.block_size for group in groups]
        noted = {model_runner_output.req_ids[request] for request in lost.requests}
        ended, spoiled = set(), set()
        for layer, slots in lost.slots.items():
            index = next(index for index, group in enumerate(groups) if layer in group.layer_names)
            blocks = {slot // sizes[index] for slot in slots}
            spoiled |= blocks
            # A prefix may be shared as soon as it is scheduled, before it has been computed.
            for request in scheduler.running:
                held = manager.get_block_ids(request.request_id)
                first = next((place for place, block in enumerate(held[index]) if block in blocks), None)
                if first is not None:
                    ended.add(request.request_id)
                    # All that comes after it was computed from it, in every group of layers.
                    for size, ids in zip(sizes, held, strict=True):
                        spoiled.update(ids[first * sizes[index] // size :])
        if len(groups) > 1 and not noted <= ended:
            # A request has left since: which blocks of other groups were its own is not known any more.
            spoiled = set(range(scheduler.kv_cache_config.num_blocks))
        manager.evict_blocks(spoiled)
        return (noted | ended) & scheduler.requests.keys()


class _Scheduler(_EndsRequests, Scheduler):
    pass


class _AsyncScheduler(_EndsRequests, AsyncScheduler):
    pass
