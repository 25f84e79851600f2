"""One memory adapter of a model: attached, detached, switched on and off, saved and loaded."""

import contextlib
import functools
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Self

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from engram_lm.adapt.decoder import Decoder, argument_names, find_decoder
from engram_lm.adapt.folder import BaseModel, layer_weights, read_adapter, write_adapter
from engram_lm.adapt.forward_pass import ForwardPass
from engram_lm.adapt.hub import files_of, push_folder
from engram_lm.adapt.patch_folder import PATCHES, with_patches
from engram_lm.errors import ConfigError
from engram_lm.hashing import HashSpec
from engram_lm.memory.config import EngramConfig
from engram_lm.memory.interface import build_layer
from engram_lm.model.plain_weights import Place, find_weight, under_peft
from engram_lm.model.table_place import TablePlace, TableSource, table_name
from engram_lm.tables import Table
from engram_lm.tables.around.cache import Policy
from engram_lm.versions import warn_if_untested

CONTAINER = "engram_adapters"
"""Name of the module that holds a model's adapters, and so what their names in its state dict begin with."""


class MemoryAdapter(ForwardPass):
    """One memory attached to one model, under a name. `engram_lm.attach` and `from_pretrained` make it.

    It is a module of the model it is attached to, so ``model.parameters()``, ``.to()``, ``.train()`` and
    ``.state_dict()`` reach it; its names there begin with ``engram_adapters.NAME.``. So a checkpoint of the model as
    ``Trainer`` writes it, or ``model.save_pretrained(folder)``, holds the adapter beside the model, and loading such a
    folder without the adapter reports its names as unexpected and gives the plain model.

    Nothing is frozen: for training the memory alone, call ``model.requires_grad_(False)`` and then
    ``adapter.requires_grad_(True)`` (peft freezes everything it does not know, too).

    ``tables`` has a table for each block, by its number as text, or one called ``shared``.
    """

    def __init__(
        self, config: EngramConfig, spec: HashSpec, tables: Mapping[str, Table], *, name: str, base: BaseModel
    ) -> None:
        super().__init__(config, spec, name)
        if not name.isidentifier():
            raise ConfigError(f"an adapter's name is made of letters, digits and underscores, not {name!r}")
        self.base = base
        self.memory_tables = nn.ModuleDict(
            {key: table for key, table in tables.items() if isinstance(table, nn.Module)}
        )
        # A table of another tier is neither moved, counted nor saved with the modules.
        self._tables_apart = {key: table for key, table in tables.items() if not isinstance(table, nn.Module)}
        self.layers = nn.ModuleDict(
            {str(block): build_layer(config, tables[table_name(spec, block)]) for block in spec.blocks}
        )
        self._handles: list[RemovableHandle] = []
        # The model is no part of the adapter, and must not become one of its modules.
        self.__dict__["_model"] = None

    @property
    def model(self) -> nn.Module | None:
        """The model it is attached to; None once detached."""
        return self.__dict__["_model"]

    def weights(self) -> dict[str, Place]:
        """Say where the weights of the layers lie now, by the names that they have in the adapter's folder.

        Raises:
            ConfigError: A layer has been replaced by something that has other weights.
        """
        return {name: find_weight(self.layers, name) for name in layer_weights(self.config, self.spec)}

    def own_parameters(self) -> list[nn.Parameter]:
        """List the parameters of the memory itself, of layers and tables, without those that peft has added to it."""
        places = self.weights().values()
        plain = [getattr(place.owner, place.attribute) for place in places if not place.is_parametrized]
        others = [
            parameter
            for place in places
            if place.is_parametrized
            for parameter in place.owner.parametrizations[place.attribute].parameters()  # type: ignore[index,union-attr]
        ]
        return [*plain, *others, *self.memory_tables.parameters()]

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        """Let the model compute without this memory inside a ``with`` block."""
        before, self.enabled = self.enabled, False
        try:
            yield
        finally:
            self.enabled = before

    def detach(self) -> None:
        """Take the memory off the model, which is then exactly what it was. The adapter keeps its weights.

        A model that was compiled with the memory has to be compiled again. Detaching twice does no harm.
        """
        for handle in self._handles:
            handle.remove()
        self._handles = []
        model = self.__dict__["_model"]
        self.__dict__["_model"] = None
        if model is not None:
            for holder, container in _containers(model):
                if container._modules.get(self.name) is self:
                    del container[self.name]
                    if not len(container):
                        del holder._modules[CONTAINER]
                    break

    def close(self) -> None:
        """Detach, and close the tables that are not parameters."""
        self.detach()
        for table in self._tables_apart.values():
            table.close()

    def save_pretrained(
        self,
        folder: str | os.PathLike[str],
        *,
        tables: bool = True,
        license: str | None = None,
        extra: str = "",
    ) -> None:
        """Write the adapter as a folder: ``config.json``, ``adapter.safetensors``, ``tables.safetensors``, a card.

        The folder appears whole or not at all. An adapter that is there already is replaced, in one step: a process
        that is killed leaves the earlier one or the new one.

        What other libraries have put around the memory's layers is not in it: a compiled or parametrized layer is
        written as the plain one. Where peft has put LoRA (or the like) on them, as ``"all-linear"`` does, the memory is
        written without it, with a warning, because ``save_pretrained`` of the peft model writes it; both load together,
        first the memory. ``merge_and_unload`` beforehand puts it into the memory instead.

        Args:
            folder: A new or empty folder, or that of an adapter.
            tables: Whether to write the tables; without them the adapter is loaded with a ``table_source``. Rows of a
                table that is read from files are copied as they are read, decoded from what they are stored as.
            license: For the card (``README.md``), such as ``"apache-2.0"``; it names none where None.
            extra: Markdown for the end of the card, such as results.

        Raises:
            ConfigError: A table is on another machine, or (``tables=False``) has rows that patches change; the license
                is no identifier; or the layers have been replaced by something that could not be loaded again, such as
                quantized ones.
            FileExistsError: There is something else in the folder, or (``tables=False``) tables or patches that would
                be lost.
            OSError: The folder cannot be written.
        """
        if names := under_peft(self.layers):
            warnings.warn(
                f"peft has put adapters on {', '.join(names)} of the memory {self.name!r}. It is saved without them: "
                "save the peft model too, and load the memory first and then peft's adapters; or call "
                "merge_and_unload() of the peft model before saving the memory",
                stacklevel=2,
            )
        self.write(folder, tables=tables, license=license, extra=extra)

    def write(
        self, folder: str | os.PathLike[str], *, tables: bool, license: str | None = None, extra: str = ""
    ) -> None:
        """Do the work of `save_pretrained` without its warning, for callers that also save what peft has added."""
        write_adapter(
            folder,
            config=self.config,
            spec=self.spec,
            base=self.base,
            layers=self.layers,
            tables=self.tables,
            tables_inside=tables,
            license=license,
            extra=extra,
        )

    def push_to_hub(
        self,
        repo_id: str,
        *,
        tables: bool = True,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        commit_message: str = "Upload memory adapter",
        license: str | None = None,
        extra: str = "",
    ) -> str:
        """Write the adapter to a repository of the Hugging Face Hub, in one commit; the repository is made if needed.

        The folder is first written beside other temporary files (``TMPDIR``), so its tables must have room there.

        Args:
            repo_id: ``"owner/name"``, or just a name for a repository of your own.
            tables: As for `save_pretrained`.
            private: Whether a repository that is made is private; the owner's default where None.
            token: What grants access; that of ``hf auth login`` where None.
            revision: Branch to write to, made if needed; the main one where None.
            create_pr: Whether to propose the change as a pull request and leave the branch alone.
            commit_message: What the commit is called.
            license: As for `save_pretrained`.
            extra: As for `save_pretrained`.

        Returns:
            Address of the commit.

        Raises:
            ConfigError: The repository holds something else, or (``tables=False``) tables that would no longer belong
                to the rest; a table is on another machine; or the name is impossible.
            RemoteError: The Hub cannot be reached or refuses.
            OSError: The folder cannot be written.
        """
        return push_folder(
            repo_id,
            lambda folder: self.save_pretrained(folder, tables=tables, license=license, extra=extra),
            tables=tables,
            private=private,
            token=token,
            revision=revision,
            create_pr=create_pr,
            commit_message=commit_message,
        )

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        path_or_repo: str | os.PathLike[str],
        *,
        tokenizer: Any = None,
        name: str = "default",
        layer_list: str | None = None,
        table_tier: str | None = None,
        table_source: TableSource | None = None,
        table_cache_bytes: int = 0,
        table_cache_policy: Policy = "clock",
        table_pinned: str | os.PathLike[str] | None = None,
        dtype: torch.dtype | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
    ) -> Self:
        """Attach an adapter that `save_pretrained` or `push_to_hub` wrote to a model of the same kind.

        Of a repository only ``config.json`` and safetensors are downloaded, all of one commit, each once what was
        downloaded before it fits the model; its tables not at all where ``table_source`` has them. Row patches that
        `engram-lm patch apply` has put into the folder are applied, over tables of any tier.

        Args:
            model: The model it was made for.
            path_or_repo: The adapter's folder, or a repository of the Hugging Face Hub where there is no such folder.
            tokenizer: The tokenizer that will be used; it is compared with the one the adapter was made with.
            name: Its name among the model's adapters.
            layer_list: As for `attach`.
            table_tier: Where rows are read from, as for ``EngramForCausalLM.from_pretrained``. Only tables of the tier
                ``"device"`` can be trained.
            table_source: Where tables lie, if not in the folder, as there.
            table_cache_bytes: As there.
            table_cache_policy: As there.
            table_pinned: As there.
            dtype: Type of the adapter's numbers; as stored where None.
            revision: Branch, tag or commit of the repository.
            token: What grants access to it; that of ``hf auth login`` where None.
            cache_dir: Where it is downloaded to.
            local_files_only: Whether to use only what was downloaded before.

        Raises:
            CheckpointError: A file or repository is missing, malformed, truncated or far too large, or holds other
                tensors than it should.
            ConfigError: The name is taken, the model has no layer list, the tier or source are impossible, or peft's
                adapters that belong on the memory were loaded before it.
            MismatchError: Hidden size, number of layers, vocabulary, tokenizer or tables are not those of the adapter.
            RemoteError: The Hub or the source cannot be reached.
        """
        decoder = find_decoder(model, layer_list)
        check_free(model, name)
        files = files_of(
            path_or_repo, revision=revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only
        )
        stored = read_adapter(files, BaseModel.of(model, decoder))
        if tokenizer is not None:
            stored.spec.bind(tokenizer)
        place = TablePlace(
            tier=table_tier or ("device" if table_source is None else "auto"),
            cache_bytes=table_cache_bytes,
            read_ahead=True,
            cache_policy=table_cache_policy,
            pinned=table_pinned,
            source=table_source,
            device=home(decoder.layers[stored.spec.blocks[0]]),
        )
        tables = stored.open_tables(place, dtype)
        try:
            # A patch holds its rows before and after, and what its facts want of them.
            most_bytes = 4 * sum(table.num_rows * table.row_bytes for table in tables.values()) + (1 << 26)
            tables = with_patches(tables, files.fetch_folder(PATCHES, most_bytes), stored.spec)
            adapter = cls(stored.config, stored.spec, tables, name=name, base=stored.base)
            adapter.layers.to(dtype=dtype or stored.dtype)
            adapter.layers.load_state_dict(stored.layers)
            # A cache that was saved with it goes on in another process that has loaded the same adapter.
            adapter._cache_key = f"{name}:{stored.digest}"
            adapter.attach_to(model, decoder)
        except BaseException:
            for table in tables.values():
                table.close()
            raise
        return adapter

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        return f"{self.name!r}, enabled={self.enabled}, before layers {list(self.spec.blocks)}"

    def attach_to(self, model: nn.Module, decoder: Decoder) -> None:
        """Become a module of the model and hook its forward pass."""
        warn_if_untested("torch", "transformers")
        _check_peft(model, self)
        self.train(model.training)
        for block in self.spec.blocks:
            layer = decoder.layers[block]
            self.layers[str(block)].to(home(layer))
        container = next((found for _, found in _containers(model)), None)
        if container is None:
            container = nn.ModuleDict()
            model.add_module(CONTAINER, container.train(model.training))
        container[self.name] = self
        self.__dict__["_model"] = model
        self.layer_list = decoder.name
        # Partials of bound methods, not closures: a copy of the model gets hooks of the copied adapter.
        for module in decoder.outer:
            before = functools.partial(self._before_outer, argument_names(module))
            self._handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
            self._handles.append(module.register_forward_hook(self._after_outer, always_call=True))
        text = decoder.text_model
        begin = functools.partial(self._before_text_model, argument_names(text))
        self._handles.append(text.register_forward_pre_hook(begin, with_kwargs=True))
        self._handles.append(text.register_forward_hook(self._after_text_model, always_call=True))
        for block in self.spec.blocks:
            hook = functools.partial(self._before_layer, block)
            self._handles.append(decoder.layers[block].register_forward_pre_hook(hook, with_kwargs=True))


def _check_peft(model: nn.Module, adapter: MemoryAdapter) -> None:
    """Refuse a memory that is attached after the adapters that peft should have put on it, and silently has not."""
    configs = getattr(model, "peft_config", None) or {}
    if not configs or any(under_peft(other) for other in attached_adapters(model).values()):
        return
    from peft.tuners.tuners_utils import check_target_module_exists

    names = [
        f"{CONTAINER}.{adapter.name}.layers.{name}"
        for name, part in adapter.layers.named_modules()
        if isinstance(part, nn.Linear)
    ]
    for name, config in configs.items():
        if getattr(config, "target_modules", None) and any(check_target_module_exists(config, full) for full in names):
            raise ConfigError(
                f"peft's adapter {name!r} is meant for the memory too (its target_modules match {names[0]}), and has "
                "been put on the model before the memory was there; put the memory on the model first, then peft"
            )


def attached_adapters(model: nn.Module) -> dict[str, MemoryAdapter]:
    """Return the memory adapters of a model by name, in the order in which they were attached."""
    return {name: adapter for _, container in _containers(model) for name, adapter in container.items()}  # type: ignore[misc]


def _containers(model: nn.Module) -> list[tuple[nn.Module, nn.ModuleDict]]:
    """Find what holds adapters: modules with a container. Wrapped by peft, it is the model inside that may have one."""
    found = [(module, module._modules.get(CONTAINER)) for module in list(model.modules())]
    return [(module, container) for module, container in found if isinstance(container, nn.ModuleDict)]


def set_adapters(model: nn.Module, names: str | Sequence[str]) -> None:
    """Enable these adapters of a model and disable the others.

    Updates of several enabled adapters add up: each adds its own to the hidden states before its layers, and where two
    share a layer, the one that was attached later sees the hidden states with the update of the one before it. With a
    single one enabled, the outputs are those of a model that has only that one, bit for bit. Switch between texts, not
    in the middle of a cache.

    Args:
        model: The model they are attached to.
        names: One name, or several; none of them to switch all off.

    Raises:
        ConfigError: The model has no adapter of a name. Nothing is switched then.
    """
    wanted = {names} if isinstance(names, str) else set(names)
    adapters = attached_adapters(model)
    if unknown := sorted(wanted - adapters.keys()):
        raise ConfigError(
            f"the model has no memory adapter called {', '.join(map(repr, unknown))}; it has "
            f"{', '.join(map(repr, adapters)) or 'none'}"
        )
    for name, adapter in adapters.items():
        adapter.enabled = name in wanted


def check_free(model: nn.Module, name: str) -> None:
    """Refuse, by a ConfigError, a name that an adapter of the model already has."""
    if name in attached_adapters(model):
        raise ConfigError(
            f"this model already has a memory adapter called {name!r}; call its detach() first, or attach another "
            "beside it with name='...'"
        )


def home(module: nn.Module) -> torch.device:
    """Where a module computes: offloaded weights are on the meta device, and accelerate's hook knows better."""
    for part in module.modules():  # the hook may be of those parts only that hold weights
        device = getattr(getattr(part, "_hf_hook", None), "execution_device", None)
        if device is not None:
            return torch.device(device)
    return next((parameter.device for parameter in module.parameters()), torch.device("cpu"))
