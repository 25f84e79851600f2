"""Our reference language model built of vLLM's parts: its attention, feed-forward networks and experts; our memory."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.models.deepseek_v2 import DeepseekV2MLP, DeepseekV2MoE
from vllm.model_executor.models.utils import maybe_prefix
from vllm.sequence import IntermediateTensors

from engram_lm.errors import CheckpointError
from engram_lm.hashing import HashSpec, TokenMap
from engram_lm.memory.interface import MemoryLayer, build_layer
from engram_lm.model.config import EngramLMConfig
from engram_lm.model.streams import StreamHead, StreamMixer
from engram_lm.model.table_place import table_name, wanted_tables
from engram_lm.serving.vllm.attention import LatentAttention
from engram_lm.serving.vllm.checkpoint import checkpoint_folder
from engram_lm.serving.vllm.memory import MemoryPass, ServedMemory, StagedRows
from engram_lm.serving.vllm.tables import open_tables, table_place
from engram_lm.serving.vllm.weights import is_table, load_parameters

# Dimension key: T tokens of all requests side by side, D hidden, S streams, V vocabulary.

_TOKEN_MAP = "model.token_map"


class EngramBlock(nn.Module):
    """One block; the same as `engram_lm.model.block.EngramBlock`, for tokens of many requests side by side."""

    def __init__(self, vllm_config: VllmConfig, config: EngramLMConfig, block: int, prefix: str) -> None:
        super().__init__()
        memory = config.memory_config
        self.block, self.num_streams = block, config.num_streams
        self.single_fusion = config.memory_fusion == "single"
        self.memory: MemoryLayer | None = None
        if memory is not None and block in memory.layers:
            self.memory = build_layer(memory)
        quantization = vllm_config.quant_config
        self.self_attn = LatentAttention(vllm_config, config, f"{prefix}.self_attn")
        self.mlp: nn.Module
        if block < config.num_dense_layers:
            self.mlp = DeepseekV2MLP(
                config.hidden_size,
                config.intermediate_size,
                config.hidden_act,
                quant_config=quantization,
                prefix=f"{prefix}.mlp",
            )
        else:
            self.mlp = DeepseekV2MoE(
                config, vllm_config.parallel_config, quant_config=quantization, prefix=f"{prefix}.mlp"
            )
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        if self.num_streams > 1:
            self.attention_streams = StreamMixer(config, site=2 * block).float()
            self.feed_forward_streams = StreamMixer(config, site=2 * block + 1).float()

    def forward(self, positions: Tensor, hidden_states: Tensor, step: MemoryPass | None) -> Tensor:
        """Update the hidden states: ``[T, D]``, or ``[T, S, D]`` with several streams."""
        if self.memory is None:
            step = None
        if step is not None and not (self.single_fusion and self.num_streams > 1):
            hidden_states = hidden_states + step.update(self.block, hidden_states)
        if self.num_streams == 1:
            hidden_states = hidden_states + self._attend(positions, hidden_states)
            return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))

        streams = hidden_states.unsqueeze(0)
        post, comb, read = self.attention_streams(streams)
        read, update = read[0], None
        if step is not None and self.single_fusion:
            update = step.update(self.block, read)
            read = read + update
        output = self._attend(positions, read)
        if update is not None:
            output = output + update
        streams = self.attention_streams.write(streams, output.unsqueeze(0), post, comb)
        post, comb, read = self.feed_forward_streams(streams)
        output = self.mlp(self.post_attention_layernorm(read[0]))
        return self.feed_forward_streams.write(streams, output.unsqueeze(0), post, comb)[0]

    def _attend(self, positions: Tensor, hidden_states: Tensor) -> Tensor:
        output: Tensor = self.self_attn(positions, self.input_layernorm(hidden_states))
        return output


class EngramModel(nn.Module):
    """The decoder without its head."""

    def __init__(self, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        config: EngramLMConfig = vllm_config.model_config.hf_config
        self.config = config
        # What vLLM's DeepSeek parts ask for and transformers' configuration does not say.
        config.topk_method, config.scoring_func, config.moe_router_dtype = "noaux_tc", "sigmoid", "float32"
        self.embed_tokens = VocabParallelEmbedding(
            config.vocab_size,
            config.hidden_size,
            quant_config=vllm_config.quant_config,
            prefix=f"{prefix}.embed_tokens",
        )
        self.layers = nn.ModuleList(
            EngramBlock(vllm_config, config, block, f"{prefix}.layers.{block}")
            for block in range(config.num_hidden_layers)
        )
        if config.num_streams > 1:
            self.stream_head = StreamHead(config).float()
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.served: ServedMemory | None = None
        if config.memory is not None:
            blocks: Any = self.layers
            self.served = ServedMemory(
                {block: blocks[block].memory for block in config.memory_layers},
                prefix=f"{prefix}.layers",
                dtype=vllm_config.model_config.dtype,
                vllm_config=vllm_config,
            )

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """Embed tokens ``[T]``, ``[T, D]``. An id outside the vocabulary must not end the engine for everybody."""
        embedded: Tensor = self.embed_tokens(input_ids.clamp(0, self.config.vocab_size - 1))
        return embedded

    def forward(self, input_ids: Tensor, positions: Tensor, staged: StagedRows | None = None) -> Tensor:
        """Compute the last hidden states, ``[T, D]``."""
        step = None if self.served is None else self.served.begin(input_ids, positions, staged)
        hidden_states = self.embed_input_ids(input_ids)
        num_streams = self.config.num_streams
        if num_streams > 1:
            hidden_states = hidden_states.unsqueeze(1).expand(-1, num_streams, -1).contiguous()
        for layer in self.layers:
            hidden_states = layer(positions, hidden_states, step)
        if num_streams > 1:
            hidden_states = self.stream_head(hidden_states.unsqueeze(0))[0]
        normed: Tensor = self.norm(hidden_states)
        return normed


class EngramForCausalLM(nn.Module):
    """What vLLM loads and runs for a checkpoint of ours: the decoder, the head, and the tables where they lie.

    It is run eagerly; see `engram_lm.serving.vllm.config_check`.
    """

    packed_modules_mapping = {"gate_up_proj": ["gate_proj", "up_proj"]}

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        self.vllm_config = vllm_config
        config: EngramLMConfig = vllm_config.model_config.hf_config
        self.config = config
        self.model = EngramModel(vllm_config, maybe_prefix(prefix, "model"))
        self.lm_head = ParallelLMHead(
            config.vocab_size,
            config.hidden_size,
            quant_config=vllm_config.quant_config,
            prefix=maybe_prefix(prefix, "lm_head"),
        )
        if config.tie_word_embeddings:
            self.lm_head = self.lm_head.tie_weights(self.model.embed_tokens)
        self.logits_processor = LogitsProcessor(config.vocab_size)

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """Embed tokens ``[T]``, ``[T, D]``."""
        return self.model.embed_input_ids(input_ids)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: Tensor | None = None,
        staged: StagedRows | None = None,
    ) -> Tensor:
        """Compute the last hidden states of the tokens of all requests, ``[T, D]``; memory may be read already."""
        assert input_ids is not None, "prompts of embeddings are refused"
        hidden_states: Tensor = self.model(input_ids, positions, staged)
        return hidden_states

    @staticmethod
    def get_model_state_cls() -> Any:
        """Return what prepares the inputs of a forward pass; vLLM asks for it on GPUs alone."""
        from engram_lm.serving.vllm.staging import StagingModelState

        return StagingModelState

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """Compute logits ``[T, V]``; None on the ranks that vLLM does not sample on."""
        logits: Tensor | None = self.logits_processor(self.lm_head, hidden_states)
        return logits

    def is_unused_checkpoint_weight(self, name: str) -> bool:
        """Whether a tensor is not read with the weights, so that vLLM leaves out files that hold nothing else."""
        return is_table(name)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Fill the parameters, bind the hash to the token map of the checkpoint, and open the tables.

        Raises:
            CheckpointError: A tensor is missing or too many, or a table is found nowhere.
            MismatchError: The token map or a table is not the one that the configuration was made for.
        """
        token_map: list[Tensor] = []

        def parameters() -> Iterable[tuple[str, Tensor]]:
            for name, tensor in weights:
                if name == _TOKEN_MAP:
                    token_map.append(tensor)
                elif not is_table(name) and not (self.config.tie_word_embeddings and name == "lm_head.weight"):
                    yield name, tensor

        experts = self.config.n_routed_experts if self.config.has_experts else 0
        loaded = load_parameters(self, parameters(), num_experts=experts)
        if self.model.served is not None:
            spec = self._bound_spec(token_map).covering(self.config.vocab_size)
            self.model.served.bind(spec, self.open_tables(spec))
        return loaded

    def _bound_spec(self, token_map: list[Tensor]) -> HashSpec:
        spec = self.config.spec
        assert spec is not None
        if spec.token_map is not None:
            return spec
        if not token_map:
            raise CheckpointError(
                f"the checkpoint lacks {_TOKEN_MAP}, from which memory knows its canonical tokens; download it again"
            )
        canonical = token_map[0].cpu().numpy()
        bound: HashSpec = spec.bind(TokenMap(canonical, vocabulary_digest=spec.vocabulary_digest))
        return bound

    def open_tables(self, spec: HashSpec) -> dict[int, Any]:
        """Open the tables where vLLM was told that they lie: block → its table."""
        memory = self.config.memory_config
        assert memory is not None
        device = self.model.embed_tokens.weight.device
        tables = open_tables(
            table_place(self.vllm_config.additional_config, device),
            checkpoint_folder(self.vllm_config),
            wanted_tables(spec, memory.head_dim),
            self.vllm_config.model_config.dtype,
        )
        return {block: tables[table_name(spec, block)] for block in self.config.memory_layers}
