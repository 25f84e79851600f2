"""What transformers needs to know of the family: how its models begin, are loaded, placed on devices and saved."""

import copy
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers.modeling_utils import PreTrainedModel
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention, DeepseekV3PreTrainedModel
from transformers.utils.output_capturing import OutputRecorder

from engram_lm.errors import CheckpointError, ConfigError, MismatchError
from engram_lm.hashing import HashSpec
from engram_lm.memory.interface import MemoryLayer
from engram_lm.memory.step import follow_vocabulary
from engram_lm.model.block import EngramBlock
from engram_lm.model.config import EngramLMConfig
from engram_lm.model.experts import Router
from engram_lm.model.plain_weights import find_weight, plain_weights
from engram_lm.model.streams import StreamHead, StreamMixer
from engram_lm.model.table_place import (
    TABLES,
    TablePlace,
    TableSource,
    stored_table,
    table_name,
    wanted_tables,
    warn_of_patches,
)
from engram_lm.tables import ParameterTable, StoredTensor, Table, TensorFolder
from engram_lm.tables.around.cache import Policy
from engram_lm.tables.around.staged import StagedTable
from engram_lm.tables.files.safetensors_file import INDEX_NAME, read_header

_NAMES_SHOWN = 8
# Device maps that transformers fills in by what fits.
_CHOSEN_BY_SIZE = ("auto", "balanced", "balanced_low_0", "sequential")


class EngramPreTrainedModel(DeepseekV3PreTrainedModel):
    """What transformers needs to know of this family."""

    config: EngramLMConfig
    config_class = EngramLMConfig
    _no_split_modules = ["EngramBlock"]
    # Whatever the cache is called, accelerate must not move it to the device of every block.
    _skip_keys_device_placement = ["past_key_values", "cache"]
    _can_record_outputs = {
        "hidden_states": EngramBlock,
        "attentions": DeepseekV3Attention,
        "gates": OutputRecorder(MemoryLayer, index=1),
        "router_logits": OutputRecorder(Router, index=0),
        "chosen_experts": OutputRecorder(Router, index=2),
    }
    # These are small, and every sublayer depends on them. From 5.24 on, transformers keeps routers in float32 too.
    _keep_in_fp32_modules_strict = [
        "mlp.gate.weight",
        "e_score_correction_bias",
        "attention_streams",
        "feed_forward_streams",
        "stream_head",
    ]
    # The only tensor outside the modules; device maps that list modules need not name it.
    _no_placement_params = ["token_map"]
    _keys_to_ignore_on_load_unexpected = None

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, MemoryLayer | ParameterTable):
            module.reset_parameters()
        elif isinstance(module, StreamMixer | StreamHead):
            module.reset_parameters(self.config.initializer_range)

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        # transformers looks for its decorator in this file's text; the decorated class is the one we import.
        return True

    @property
    def tables(self) -> dict[str, Table]:
        """The memory tables by the block that reads them, or one called ``shared``.

        Each is a `ParameterTable`, or a table of the tier from which ``from_pretrained`` was told to read it.
        """
        base = self.base_model
        return {**base.memory_tables, **base.tables_apart.tables}

    @property
    def hash_spec(self) -> HashSpec:
        """How this model turns tokens into row numbers, bound to its token map.

        Raises:
            TokenMapError: The model has no memory, or has not been given its token map.
            MismatchError: The token map in the checkpoint is not the one its configuration was made with.
        """
        return self.base_model._bound_spec()

    def bind_tokenizer(self, tokenizer: Any) -> None:
        """Give the model the token map of its tokenizer, where it was built from a configuration file alone.

        Args:
            tokenizer: A Hugging Face fast tokenizer, or a `TokenMap`.

        Raises:
            MismatchError: Its canonical tokens are not those the model was configured for; both digests are named.
        """
        base = self.base_model
        if base.config.spec is None:
            return
        spec = base.config.spec.bind(tokenizer)
        base.token_map.copy_(torch.from_numpy(spec.token_map.made.canonical.copy()))
        base.bound_spec = spec.covering(base.config.vocab_size)

    def check_tokenizer(self, tokenizer: Any) -> None:
        """Refuse a tokenizer other than the one the model's memory was trained with.

        A tokenizer that has gained tokens since, with the old ids unchanged, is accepted with a warning in the log.

        Raises:
            MismatchError: With both digests, and the first token that is canonical in another way.
        """
        if self.config.spec is not None:
            (self.base_model.bound_spec or self.config.spec).bind(tokenizer)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: Any,
        *args: Any,
        tokenizer: Any = None,
        table_tier: str | None = None,
        table_source: TableSource | None = None,
        table_cache_bytes: int = 0,
        table_cache_policy: Policy = "clock",
        table_pinned: str | os.PathLike[str] | None = None,
        table_read_ahead: bool = True,
        **kwargs: Any,
    ) -> Any:
        """Load a model as ``transformers`` does, and check that the checkpoint is whole and fits its hash.

        With ``device_map="auto"`` (and similar ones) the tables stay on the host: rows are read there, and only these
        rows are copied. A map of several devices places them by the name ``model.memory_tables``; ``"disk"`` leaves
        them in the checkpoint's safetensors files, where rows are read in place and not trained.

        With ``table_tier`` all tables are read from one tier, whatever a device map says of them. Logits are the same
        to the bit. Such tables are no parameters: they are neither trained, counted nor moved, and the rest of the
        model trains around them. They stay open, and the files must stay, as long as the model is used.

        With ``table_source`` tables come from elsewhere than the checkpoint, which then need not have them: packed
        files, another folder, a file server, a Mooncake Store. Each is compared with the model's HashSpec. Logits are
        those of the checkpoint's tables, to the bit, where the source holds their rows unrounded.

        Args:
            pretrained_model_name_or_path: A folder or a repository.
            *args: As in ``PreTrainedModel.from_pretrained``.
            tokenizer: The tokenizer that will be used with the model.
            table_tier: ``"device"`` (parameters, loaded with the model), ``"mmap"`` and ``"file"`` (left in the
                checkpoint's safetensors files), ``"host"`` (loaded, as stored), ``"remote"`` (on the
                machine that a ``table_source`` names), or ``"auto"`` (what suits the table and the machine). None:
                ``"auto"`` with a source, else ``"device"``.
            table_source: Where tables lie: a folder, a file or an address as `open_table` takes it, which holds a table
                for each name of `tables`; such a text with ``{table}`` in place of the name, as
                ``"mooncake://host:port/mine-{table}"``; or a mapping from names (or block numbers) to sources, the
                others being the checkpoint's.
            table_cache_bytes: Bytes of a cache before each table, which keeps rows that were read; 0 for none.
            table_cache_policy: Which of them give way, ``"clock"`` or ``"lru"``; see `CachedTable`.
            table_pinned: A trace that `record_rows` saved: the rows it reads most are put into the cache at once, as
                many as fit, and never give way.
            table_read_ahead: Whether rows are read in the background from when the tokens are known; never from the
                tier ``"host"``, where they are in memory already.
            **kwargs: As in ``PreTrainedModel.from_pretrained``.

        Raises:
            CheckpointError: A file is missing, truncated or malformed, or tensors of the model are missing. The latter
                is allowed with ``ignore_mismatched_sizes=True``, and for a head on the checkpoint of a base model.
            ConfigError: An unknown tier, a source that is not for this model, or a cache for tables that are
                parameters.
            DataError: The trace cannot be read, or is of other blocks.
            MismatchError: The checkpoint's token map, its tables, those of the source, or the tokenizer do not fit its
                HashSpec.
            RemoteError: A server does not answer, or has no such table.
        """
        place = TablePlace(
            tier=table_tier or ("device" if table_source is None else "auto"),
            cache_bytes=table_cache_bytes,
            read_ahead=table_read_ahead,
            cache_policy=table_cache_policy,
            pinned=table_pinned,
            source=table_source,
            device=_one_device(kwargs.get("device_map")),
        )
        source = pretrained_model_name_or_path
        if source is not None:
            _check_index(Path(source) / (kwargs.get("subfolder") or ""))
        kwargs["device_map"], places = _split_device_map(kwargs.get("device_map"))
        if place.tier != "device" or table_source is not None:
            places = {"": place}
        # What stands behind the source reaches `__init__`.
        more = () if places is None else (places,)
        try:
            result = super().from_pretrained(source, *args, *more, **kwargs)
        except SafetensorError as error:
            raise CheckpointError(f"cannot read the weights of {source}: {error}; download them again") from error
        except RuntimeError as error:
            if "mismatched_sizes" not in str(error):
                raise
            raise MismatchError(
                f"weights of this checkpoint do not have the sizes that its configuration gives"
                f"{_digest_of(source)}; the report above names them. It belongs to another model, or was edited"
            ) from error
        model = result[0] if isinstance(result, tuple) else result
        warn_of_patches(source)
        try:
            if places is not None:
                model._adopt_tables(kwargs["device_map"])
            if model.config.memory is not None and not model.base_model.token_map.is_meta:
                _ = model.hash_spec
                if tokenizer is not None:
                    model.check_tokenizer(tokenizer)
        except BaseException:
            model.base_model.tables_apart.close()
            raise
        return result

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Save as ``transformers`` does; tables that are read from another tier are copied from the checkpoint.

        Tables that are read from a ``table_source`` stay there: the saved model is loaded with the same source again.
        Parts that are compiled, parametrized or under peft are written as the plain ones, without peft's adapters,
        which peft's own ``save_pretrained`` writes.

        Raises:
            ConfigError: The folder holds the very files that tables are being read from, or a part of the model has
                been replaced by something that could not be loaded again.
        """
        apart = self.base_model.tables_apart
        apart.check_folder(Path(save_directory))
        # Models that were loaded quantized, or with peft inside, have a way of saving of their own in transformers.
        is_own = getattr(self, "hf_quantizer", None) is None and not getattr(self, "_hf_peft_config_loaded", False)
        if is_own and len(args) < 2 and kwargs.get("state_dict") is None:
            tables = {f"{self._base_prefix}{TABLES}.{name}.weight": table for name, table in apart.mapped().items()}
            plain = self._plain_state_dict()
            if tables or plain.keys() != self.state_dict().keys():
                kwargs["state_dict"] = {**plain, **tables}
        super().save_pretrained(save_directory, *args, **kwargs)

    def _plain_state_dict(self) -> dict[str, torch.Tensor]:
        """The weights under the names that `from_pretrained` knows, and whatever else somebody has added."""
        with torch.device("meta"):
            expected = type(self)(copy.deepcopy(self.config)).state_dict()
        for name in self.base_model.tables_apart.tables:
            expected.pop(f"{self._base_prefix}{TABLES}.{name}.weight", None)
        found, state = plain_weights(self, expected), self.state_dict()
        return {**found.weights, **{name: state[name] for name in found.unknown}}

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Load as torch does, also where parts of the model are now inside others, such as compiled blocks."""
        present = self.state_dict().keys()
        return super().load_state_dict(
            {name if name in present else self._name_now(name): value for name, value in state_dict.items()},
            *args,
            **kwargs,
        )

    def _name_now(self, name: str) -> str:
        try:
            return find_weight(self, name).name
        except ConfigError:
            return name

    def stage_tables(self, max_tokens: int) -> None:
        """Let rows of tables that are off this model's GPU travel to it while it computes.

        Each block with memory gets a `StagedTable` of its own: pinned memory and device memory at fixed addresses, a
        stream and an event. Nothing is done for tables on the GPU, nor for a model that is not on one. Moving the model
        to another device afterwards asks for another call.

        Args:
            max_tokens: Tokens of the largest forward pass to stage, batch times length; larger ones are read as before.

        Raises:
            ConfigError: ``max_tokens`` is less than 1.
        """
        if max_tokens < 1:
            raise ConfigError(f"max_tokens must be at least 1, not {max_tokens}")
        base = self.base_model
        if not base.config.memory_layers or base.config.memory_config.entry.reads != "rows":
            return  # rows that only the layer chooses cannot travel before it computes
        for block in base.config.memory_layers:
            memory, device = base.layers[block].memory, next(base.layers[block].memory.parameters()).device
            table = memory.table.table if isinstance(memory.table, StagedTable) else memory.table
            if device.type == "cuda" and not isinstance(table, ParameterTable):
                max_rows = max_tokens * memory.config.num_heads_total
                memory.table = StagedTable(table, device, max_rows=max_rows)

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Embedding:
        """Change the size of the vocabulary, as ``transformers`` does; never below the tokens that memory hashes.

        Memory hashes each id beyond those of its HashSpec as a token of its own, so tokens that are added can be
        trained. What old tokens read, and the HashSpec, stay as they are.

        Raises:
            MismatchError: The new size is less than the number of tokens that memory hashes.
        """
        spec = self.config.spec
        if spec is not None and new_num_tokens is not None and new_num_tokens < spec.num_tokens:
            raise MismatchError(
                f"memory hashes {spec.num_tokens} tokens, so the vocabulary cannot shrink to {new_num_tokens}"
            )
        embedding: nn.Embedding = super().resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        if (bound := self.base_model.bound_spec) is not None:
            self.base_model.bound_spec = follow_vocabulary(bound, self.config.vocab_size)
        return embedding

    @staticmethod
    def _load_pretrained_model(
        model: Any, state_dict: Any, checkpoint_files: Any, load_config: Any, expected_keys: Any = None
    ) -> Any:
        """Check the files, let transformers load what is in the module tree, then load the tables that are not."""
        if expected_keys is not None:  # an adapter for this model, not the model
            given = (model, state_dict, checkpoint_files, load_config, expected_keys)
            return PreTrainedModel._load_pretrained_model(*given)
        stored = _check_files(checkpoint_files, load_config.sharded_metadata)
        apart, spec, memory = model.base_model.tables_apart, model.config.spec, model.config.memory_config
        wanted = wanted_tables(spec, memory.head_dim) if spec and memory and memory.entry.has_table else {}
        # Before the weights are loaded, because a server may not answer.
        elsewhere = apart.locate(wanted)
        if not load_config.ignore_mismatched_sizes:
            for name, table in wanted.items():
                if name not in elsewhere and (source := stored_table(stored, name)) is not None:
                    table.check(str(source), source.shape)
        info, offloaded = PreTrainedModel._load_pretrained_model(model, state_dict, checkpoint_files, load_config)
        try:
            missing = info.missing_keys | apart.load(
                wanted, stored, elsewhere, info.unexpected_keys, load_config.dtype, model._base_prefix
            )
            if not load_config.ignore_mismatched_sizes:
                _check_missing(missing, model.all_tied_weights_keys, model._base_prefix, stored or state_dict or ())
        except BaseException:
            apart.close()
            raise
        return info, offloaded

    def _adopt_tables(self, device_map: Any) -> None:
        """Give the tables that were loaded apart to the model, now that nothing will move them any more."""
        base, spec = self.base_model, self.config.spec
        # Other libraries look at this attribute to learn whether a model may be moved or compiled.
        if not hasattr(self, "hf_device_map"):
            self.hf_device_map = dict(device_map) if isinstance(device_map, Mapping) else {"": str(self.device)}
        for name, table, place in base.tables_apart.adopted(self._base_prefix):
            self.hf_device_map[f"{self._base_prefix}{TABLES}.{name}"] = place
            for block in self.config.memory_layers:
                if spec is not None and table_name(spec, block) == name:
                    base.layers[block].memory.table = table
            if isinstance(table, ParameterTable):
                base.memory_tables[name] = table.train(self.training)

    @property
    def _base_prefix(self) -> str:
        """What the names of the base model begin with."""
        return "" if self.base_model is self else f"{self.base_model_prefix}."


def _digest_of(source: Any) -> str:
    """The HashSpec digest of a checkpoint's configuration, for a message."""
    try:
        spec = EngramLMConfig.from_pretrained(source).spec
    except (OSError, ValueError):
        return ""
    return "" if spec is None else f" (HashSpec {spec.digest})"


def _split_device_map(device_map: Any) -> tuple[Any, dict[str, Any] | None]:
    """Divide a device map into the backbone's part and the tables' part, so that nothing moves the tables later.

    The tables' part is None where everything is on one device and tables are loaded with the rest.
    """
    if isinstance(device_map, str) and device_map in _CHOSEN_BY_SIZE:
        # A table is read a few rows at a time: it never deserves an accelerator's memory before the backbone.
        return device_map, {"": "cpu"}
    if not isinstance(device_map, Mapping):
        return device_map, None
    devices = {str(device) for device in device_map.values()}
    if len(devices) == 1 and "disk" not in devices:
        return device_map, None
    rest = {name: device for name, device in device_map.items() if TABLES not in name.split(".")}
    return rest or None, dict(device_map)


def _one_device(device_map: Any) -> str | int | torch.device:
    """The device that a device map puts everything on; the CPU where it puts things on several, or says nothing."""
    devices = set(device_map.values()) if isinstance(device_map, Mapping) else {device_map}
    if len(devices) != 1 or (device := devices.pop()) is None or device in ("disk", *_CHOSEN_BY_SIZE):
        return "cpu"
    return device


def _check_index(folder: Path) -> None:
    """Refuse the index of a local checkpoint that cannot be read or points out of its folder."""
    if (folder / INDEX_NAME).is_file() and not (folder / "model.safetensors").is_file():
        TensorFolder(folder)


def _check_files(files: Sequence[str] | None, metadata: Mapping[str, Any] | None) -> dict[str, StoredTensor]:
    """Read the headers of a checkpoint's files and compare them with the files' sizes and with its index.

    transformers loads what it finds, and makes random numbers and a warning of a missing tensor. Here it is an error.
    The result maps the tensors' names to their places, and is empty for other formats than safetensors.
    """
    paths = [Path(file) for file in files or () if str(file).endswith(".safetensors")]
    tensors: dict[str, StoredTensor] = {}
    for path in paths:
        if not path.exists():
            raise CheckpointError(
                f"{path} is missing: the checkpoint's {INDEX_NAME} names {len(paths)} files; download it again"
            )
        tensors |= read_header(path)
    for name, file in ((metadata or {}).get("weight_map") or {}).items():
        if paths and (name not in tensors or Path(tensors[name].file).name != Path(file).name):
            raise CheckpointError(f"{file} does not hold {name}, although {INDEX_NAME} says so; download both again")
    return tensors


def _check_missing(missing: Iterable[str], tied: Mapping[str, str], prefix: str, present: Iterable[str]) -> None:
    """Refuse a checkpoint that lacks weights of the model; a head may be missing where the checkpoint is of a base.

    ``tied`` maps a name to the one that it shares its weight with, of which only the latter is stored. Names of the
    base model begin with ``prefix``, which is empty for the base model itself.
    """
    missing = set(missing)
    missing = {name for name in missing if tied.get(name, name) in missing}
    if prefix and not any(name.startswith(prefix) for name in present):
        missing = {name for name in missing if name.startswith(prefix)}
    if missing:
        names = sorted(missing)
        more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
        elsewhere = any(TABLES in name.split(".") for name in names)
        raise CheckpointError(
            f"the checkpoint lacks {len(names)} tensors of the model that its configuration describes: "
            f"{', '.join(names[:_NAMES_SHOWN])}{more}. Download it again, or "
            f"{'say with table_source= where its tables lie, or ' if elsewhere else ''}pass "
            "ignore_mismatched_sizes=True to begin with random ones instead"
        )
