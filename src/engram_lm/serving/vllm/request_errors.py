"""What a server answers to a request that failed: the reason, where vLLM alone would say "Internal server error"."""

from http import HTTPStatus
from typing import Any

from vllm.exceptions import GracefulHTTPError
from vllm.outputs import RequestOutput
from vllm.v1.engine import async_llm
from vllm.v1.engine.output_processor import RequestOutputCollector


class _Collector(RequestOutputCollector):
    """Hands the outputs of one request to whoever waits for them; a failure that has a reason is raised there."""

    def put(self, output: Any) -> None:
        """Take one output."""
        for answer in output.outputs if isinstance(output, RequestOutput) else ():
            if answer.finish_reason == "error" and isinstance(answer.stop_reason, str):
                output = GracefulHTTPError(answer.stop_reason, HTTPStatus.INTERNAL_SERVER_ERROR)
        super().put(output)


def name_errors() -> None:
    """Have the server of this process give reasons."""
    async_llm.RequestOutputCollector = _Collector
