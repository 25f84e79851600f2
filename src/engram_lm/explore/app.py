"""The page itself: Gradio's widgets around an `Explorer`, which knows nothing of them."""

import functools
import importlib.resources
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engram_lm.adapt import FactEdit
from engram_lm.errors import ConfigError, EngramError, MissingExtraError
from engram_lm.explore.explorer import Edits, Explorer, TokenView, View
from engram_lm.explore.markup import facts_panel, header, notices, prediction_panel, strip, token_panel
from engram_lm.explore.opening import open_explorer
from engram_lm.explore.policy import ContentPolicy
from engram_lm.serving.load import ModelFlags

if TYPE_CHECKING:
    import gradio

_MODEL = "model"
"""All calls that ask the model wait in one queue of this name."""
_LONGEST_WORDING = 20_000
_FONT = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica Neue", "Liberation Sans", "Arial", "sans-serif")
_MONO = ("ui-monospace", "SF Mono", "Cascadia Code", "Menlo", "Consolas", "DejaVu Sans Mono", "monospace")
_FIRST_TEXT = "Only Alexander the Great could tame the horse Bucephalus."
_FIRST_IDS = "17, 4, 256, 17, 4"
_FIRST_READING = "The text is being read; the first time takes longer than later ones."

Session = dict[str, Edits]
"""The facts of one visitor by the label of the memory they are for."""


def build_app(
    model: str | Path | Explorer,
    *,
    adapters: Sequence[str] = (),
    data: Sequence[str | Path] = (),
    tokenizer: str | Path | None = None,
    tables: ModelFlags | None = None,
    device: str = "cpu",
    max_tokens: int = 256,
    text: str | None = None,
) -> "gradio.Blocks":
    """Build the page as a Gradio application, for ``launch()`` on this machine or as the app of a Space.

    Launched without arguments it listens on this machine alone, asks nothing of the network and reports to nobody. Each
    tab has its own text and its own facts; the model is shared and never changed.

    Args:
        model: What `open_explorer` opens, or an `Explorer`; the other arguments, except the last, are for the former.
        adapters: See `open_explorer`, as the next ones.
        data: Text whose frequent N-grams are compared.
        tokenizer: For a configuration without weights.
        tables: Where the memory tables are read from.
        device: Where to run.
        max_tokens: Tokens of a text that are read, at most.
        text: The text that the page begins with.

    Raises:
        MissingExtraError: Gradio is not installed.
        EngramError: As `open_explorer`.

    Example:
        >>> build_app("runs/quickstart").launch()  # doctest: +SKIP
    """
    if not isinstance(model, Explorer):
        options: dict[str, Any] = {"adapters": adapters, "data": data, "tokenizer": tokenizer, "tables": tables}
        model = open_explorer(model, device=device, max_tokens=max_tokens, **options)
    if text is None:
        text = _FIRST_IDS if model.tokenizer is None else _FIRST_TEXT
    return _page(model, text)


def _page(explorer: Explorer, first_text: str) -> "gradio.Blocks":
    gr = _gradio()
    calls = {"api_visibility": "private", "concurrency_id": _MODEL, "concurrency_limit": 1}
    with _blocks_class()(title=f"{explorer.name} · engram-lm explore", analytics_enabled=False) as app:
        session, view = gr.State({}), gr.State(None)
        head = gr.HTML(header(explorer, explorer.memories[0]), apply_default_css=False, elem_id="engram-head")
        ids = explorer.tokenizer is None
        text = gr.Textbox(
            first_text,
            label="Token ids" if ids else "Text",
            info="The configuration came without a tokenizer." if ids else "Type or paste; the page follows.",
            lines=2,
            max_lines=10,
            elem_id="engram-text",
        )
        memory = gr.Dropdown(
            [(name or "the model’s own", name) for name in explorer.memories],
            value=explorer.memories[0],
            label="Memory to look at; the others stay switched on",
            visible=len(explorer.memories) > 1,
            elem_id="engram-memory",
        )
        said = gr.HTML(notices([_FIRST_READING]), apply_default_css=False, elem_id="engram-said")
        tokens = gr.HTML(apply_default_css=False, js_on_load=_asset("strip.js"), elem_id="engram-tokens")
        with gr.Row(equal_height=False):
            with gr.Column(scale=1, min_width=280):
                token = gr.HTML(apply_default_css=False, elem_id="engram-token")
            with gr.Column(scale=1, min_width=280, visible=explorer.model is not None):
                predictions = gr.HTML(apply_default_css=False, elem_id="engram-predictions")
        read = functools.partial(_read, explorer)

        def look(view: View | None, session: Session, event: gr.EventData) -> tuple[str, str]:  # type: ignore[name-defined]
            return _look(explorer, view, session, int(event.index), int(event.block))

        def write(
            memory: str,
            session: Session,
            prompt: str,
            answer: str,
            about: str,
            wordings: str,
            progress: Any = gr.Progress(),  # noqa: B008 - how Gradio finds where to report
        ) -> tuple[Any, ...]:
            return _add(explorer, listed, memory, session, (prompt, answer, about, wordings), progress)

        reads: dict[str, Any] = {
            "inputs": [text, memory, session],
            "outputs": [view, said, tokens, token, predictions],
            "show_progress": "hidden",
            **calls,
        }
        app.load(read, **reads)
        # A change of the value, because pasted text is no key that was pressed.
        text.change(read, trigger_mode="always_last", **reads)
        tokens.select(
            look,
            inputs=[view, session],
            outputs=[token, predictions],
            trigger_mode="always_last",
            show_progress="hidden",
            **calls,
        )
        memory.change(functools.partial(header, explorer), inputs=[memory], outputs=[head], **calls)
        if explorer.model is None or explorer.spec(explorer.memories[0]) is None:
            memory.change(read, **reads)
            return app
        with gr.Column(elem_id="engram-facts"):
            gr.HTML(
                "<h2>Write a fact into the memory</h2><p>A fact changes rows of the N-grams at the end of its subject. "
                "It is yours alone: other tabs and the model’s files never see it.</p>",
                apply_default_css=False,
            )
            with gr.Row():
                prompt = gr.Textbox(label="Prompt", placeholder="The capital of Elbonia is")
                answer = gr.Textbox(label="Answer", placeholder="Mudville")
                about = gr.Textbox(label="Subject", placeholder="Elbonia")
            wordings = gr.Textbox(
                label="Other wordings, one a line",
                placeholder="Elbonia's capital is",
                lines=1,
                max_lines=6,
            )
            with gr.Row():
                add = gr.Button("Write the fact", variant="primary", elem_id="engram-add")
                back = gr.Button("Take chosen facts back", interactive=False, elem_id="engram-back")
                save = gr.DownloadButton("Save as a patch", interactive=False, elem_id="engram-save")
            facts = gr.CheckboxGroup([], label="Your facts", visible=False, elem_id="engram-list")
            refused = gr.HTML(apply_default_css=False, elem_id="engram-refused")
            report = gr.HTML(apply_default_css=False, elem_id="engram-report")
        save.GRADIO_CACHE = str(app.folder)  # where the button's files are, so that Gradio makes no copies
        listed = functools.partial(_listed, explorer, app.folder)
        changed: dict[str, Any] = {"outputs": [session, refused, report, facts, back, save], **calls}
        add.click(write, inputs=[memory, session, prompt, answer, about, wordings], **changed).then(read, **reads)
        take_back = functools.partial(_take_back, explorer, listed)
        back.click(take_back, inputs=[memory, session, facts], **changed).then(read, **reads)
        memory.change(read, **reads).then(listed, inputs=[memory, session], **changed)
    return app


def _read(explorer: Explorer, text: str, memory: str, session: Session) -> Iterator[tuple[Any, ...]]:
    """Read a text, show its tokens, and then look at the last one, which takes longer."""
    edits = _edits(session, memory)
    try:
        view = explorer.read(text, edits)
        shown, unchanged = (view, notices(view.notes), strip(view)), _gradio().skip()
        yield (*shown, unchanged, unchanged)
        yield (*shown, *_panels(explorer, view, explorer.look(view, len(view.tokens) - 1, edits)))
    except EngramError as error:
        yield None, notices([f"{error}."], kind="error"), "", "", ""


def _look(explorer: Explorer, view: View | None, session: Session, position: int, place: int) -> tuple[str, str]:
    """Look at the token that was chosen, and what the block at a place among those with memory reads there."""
    if view is None:
        return "", ""
    blocks = () if view.addresses is None else view.addresses.spec.blocks
    try:
        block = blocks[place] if 0 <= place < len(blocks) else None
        return _panels(explorer, view, explorer.look(view, position, _edits(session, view.memory), block=block))
    except EngramError as error:
        return notices([f"{error}."], kind="error"), ""


def _panels(explorer: Explorer, view: View, token: TokenView) -> tuple[str, str]:
    return token_panel(explorer, view, token), prediction_panel(view, token)


def _add(
    explorer: Explorer,
    listed: Callable[..., tuple[Any, ...]],
    memory: str,
    session: Session,
    typed: tuple[str, str, str, str],
    progress: Any,
) -> tuple[Any, ...]:
    """Fit a fact, as it was typed, beside the others of this visitor."""
    edits = _edits(session, memory)
    try:
        fact = read_fact(*typed)
        progress(0, desc="Fitting the fact")
        edits = explorer.add_fact(
            fact,
            edits,
            on_progress=lambda now: progress((now.round + now.num_done / now.num_facts) / 3, desc="Fitting the fact"),
        )
        progress(0.8, desc="Proving what is untouched")
    except EngramError as error:
        return _refused(session, notices([f"{error}."], kind="error"))
    return listed(memory, {**session, memory: edits})


def read_fact(prompt: str, answer: str, subject: str = "", wordings: str = "") -> FactEdit:
    """Make a fact of what a person typed: the space before an answer is put there where the prompt ends with a word.

    Raises:
        ConfigError: A text is empty or far too long, or the subject is missing from a wording.
    """
    prompt, answer, subject = prompt.strip(), answer.strip(), subject.strip()
    others = tuple(line.strip() for line in wordings.splitlines() if line.strip())
    # The words of `FactEdit` name its fields; here they are called as the page calls them.
    for label, text in (("Prompt", prompt), ("Answer", answer), ("Subject", subject), ("Other wordings", wordings)):
        if len(text) > _LONGEST_WORDING:
            raise ConfigError(f"“{label}” has {len(text):,} characters; it takes at most {_LONGEST_WORDING:,}")
    if not prompt or not answer:
        raise ConfigError(f"“{'Answer' if prompt else 'Prompt'}” is empty; a fact is a prompt and how it goes on")
    for text in (prompt, *others):
        if subject not in text:
            raise ConfigError(
                f"the subject {subject!r:.100} is not in {text!r:.200}; “Prompt” and every line of “Other wordings” "
                "name it, spelled alike"
            )
    spaced = f" {answer}" if prompt[-1].isascii() else answer
    return FactEdit(prompt=prompt, answer=spaced, subject=subject, paraphrases=others)


def _take_back(
    explorer: Explorer,
    listed: Callable[..., tuple[Any, ...]],
    memory: str,
    session: Session,
    prompts: Sequence[str],
) -> tuple[Any, ...]:
    """Take the chosen facts back."""
    if not prompts:
        return _refused(session, notices(["Choose the facts to take back in the list."]))
    try:
        edits = explorer.take_back(prompts, _edits(session, memory))
    except EngramError as error:
        return _refused(session, notices([f"{error}."], kind="error"))
    return listed(memory, {**session, memory: edits})


def _refused(session: Session, said: str) -> tuple[Any, ...]:
    """Say why nothing has changed, and leave the facts, their report and their buttons as they are."""
    unchanged = _gradio().skip()
    return session, said, unchanged, unchanged, unchanged, unchanged


def _listed(explorer: Explorer, folder: Path, memory: str, session: Session) -> tuple[Any, ...]:
    """Show the facts of a memory and what they do, and update the list of facts and the buttons that need one."""
    gr, edits = _gradio(), _edits(session, memory)
    report = facts_panel(explorer.answers(edits), explorer.proof(edits))
    prompts = list(edits.prompts)
    facts = gr.CheckboxGroup(choices=prompts, value=[], visible=bool(prompts))
    # The button hands out the file that it holds when it is pressed, so it always holds the facts of the list.
    save = gr.DownloadButton(value=_saved(edits, folder), interactive=bool(prompts))
    return session, "", report, facts, gr.Button(interactive=bool(prompts)), save


def _saved(edits: Edits, folder: Path) -> str | None:
    """Write the facts as a patch for the visitor to download; None without any. The file lives as long as the facts."""
    if edits.patch is None:
        return None
    path = _folder_of(edits.patch, folder) / "facts.safetensors"
    edits.patch.save(path)
    return str(path)


def _folder_of(owner: Any, parent: Path | None = None) -> Path:
    """Make a temporary folder that is removed when its owner is gone, or when the process ends."""
    # Resolved, because Gradio compares paths as they are written.
    folder = Path(tempfile.mkdtemp(prefix="engram-explore-", dir=parent)).resolve()
    weakref.finalize(owner, shutil.rmtree, folder, ignore_errors=True)
    return folder


def _edits(session: Mapping[str, Edits], memory: str) -> Edits:
    return session.get(memory, Edits(memory))


def _asset(name: str) -> str:
    return importlib.resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


def _gradio() -> Any:
    try:
        import gradio
    except ImportError as error:
        raise MissingExtraError("the page needs Gradio: pip install 'engram-lm[explore]' brings it") from error
    return gradio


def _theme() -> Any:
    """Return Gradio's plainest theme in the colors of this library's pages, with the system's own fonts."""
    gr = _gradio()
    plain = gr.themes.Base(
        font=_FONT, font_mono=_MONO, primary_hue="orange", neutral_hue="stone", radius_size=gr.themes.sizes.radius_md
    )
    both = {
        "body_background_fill": ("#fbfbf9", "#131416"),
        "body_text_color": ("#1d1f22", "#e6e6e2"),
        "body_text_color_subdued": ("#5d6067", "#a4a8af"),
        "block_background_fill": ("transparent", "transparent"),
        "block_info_text_color": ("#5d6067", "#a4a8af"),
        "block_label_text_color": ("#1d1f22", "#e6e6e2"),
        "block_title_text_color": ("#1d1f22", "#e6e6e2"),
        "border_color_primary": ("#e2e2dc", "#34373d"),
        "input_background_fill": ("#ffffff", "#1d1f23"),
        "input_border_color": ("#d5d5cd", "#34373d"),
        "input_placeholder_color": ("#767981", "#8b8f97"),
        "button_primary_background_fill": ("#b04a00", "#f0a24a"),
        "button_primary_background_fill_hover": ("#8f3c00", "#f6b877"),
        "button_primary_text_color": ("#ffffff", "#131416"),
        "button_secondary_background_fill": ("#efefea", "#2a2d32"),
        "button_secondary_background_fill_hover": ("#e2e2dc", "#34373d"),
        "button_secondary_text_color": ("#1d1f22", "#e6e6e2"),
    }
    values = {name: light for name, (light, _) in both.items()}
    dark = {f"{name}_dark": dark for name, (_, dark) in both.items()}
    return plain.set(
        block_padding="0px",
        block_border_width="0px",
        input_border_width="1px",
        block_title_text_weight="600",
        **values,
        **dark,
    )


@functools.cache
def _blocks_class() -> Any:
    """Make the class of the page: Gradio's, with other defaults for ``launch``."""
    gr = _gradio()
    from starlette.middleware import Middleware

    class Page(gr.Blocks):  # type: ignore[name-defined]
        """A page that asks nothing of the network and looks like the reports of this library."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.folder = _folder_of(self)
            """Where patches lie until they are downloaded."""

        def launch(self, *args: Any, **kwargs: Any) -> Any:
            # Fonts are the system's own; Gradio's settings and API page are no part of this page.
            look = {
                "theme": _theme(),
                # Not as ``css``, which Gradio confines to what it calls the content of the page.
                "head": f"<style>{_asset('page.css')}</style>",
                "footer_links": [],
                "share": False,
                "quiet": True,
                "allowed_paths": [*(kwargs.pop("allowed_paths", None) or ()), str(self.folder)],
            }
            options = dict(kwargs.pop("app_kwargs", None) or {})
            options["middleware"] = [*options.get("middleware", ()), Middleware(ContentPolicy)]
            return super().launch(*args, **{**look, **kwargs}, app_kwargs=options)

    return Page
