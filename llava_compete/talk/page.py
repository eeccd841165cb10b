"""A page in the browser (Gradio): pictures and questions to one model or two, and where their answers were routed.

Nothing is fetched from elsewhere and nothing is reported. One question is answered at a time, others wait in a queue.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
from fastapi import FastAPI

from llava_compete.errors import UserError
from llava_compete.talk.answer_maps import experts_html
from llava_compete.talk.conversation import Conversation, Reply, Turn, ask, load_pictures
from llava_compete.talk.examples import Example
from llava_compete.talk.limits import Limits
from llava_compete.talk.sampling import Sampling
from llava_compete.talk.talker import Talker

MOST_WAITING = 32  # questions in the queue; one more is refused
_ENDING_S = 10.0  # how long a new conversation waits for the old one's answer to end
_KEPT_S = 24 * 3600  # files that were uploaded, and conversations
_CSS = """
.experts .scroll { overflow-x: auto; }
.experts figure { margin: 0 0 1.2rem; } .experts figcaption { font-size: .85rem; margin-top: .3rem; }
.experts img { background: #fff; max-width: none; } .experts img.map { width: min(64rem, max(100%, 36rem)); }
.experts img.use { width: auto; }
.experts table.tokens { border-collapse: collapse; font-size: .8rem; }
.experts table.tokens th, .experts table.tokens td { border: 1px solid #c8c8c8; text-align: center; }
.experts table.tokens th, .experts table.tokens td { padding: .15rem .4rem; }
.experts table.tokens th { white-space: pre; }
footer, .message-buttons button[title="Share"], button[aria-label="Share"] { display: none !important; }
"""


@dataclass
class _Running:
    """The answer that a visitor waits for."""

    stop: threading.Event = field(default_factory=threading.Event)
    ended: threading.Event = field(default_factory=threading.Event)
    is_dropped: bool = False  # by a new conversation: what comes yet is not shown


class Page:
    """What the page's events do.

    Args:
        talkers: by name; one or two.
        limits: of one question.
    """

    def __init__(self, talkers: Mapping[str, Talker], limits: Limits) -> None:
        self.names, self.talkers, self.limits = list(talkers), list(talkers.values()), limits
        self._running: dict[str, _Running] = {}

    def answer(
        self,
        asked: dict[str, Any],
        conversation: Conversation,
        system: str,
        settings: Sequence[Any],
        session: str,
    ) -> Iterator[Conversation]:
        """The conversation, anew with each piece of an answer.

        Args:
            asked: {"text", "files"}; settings: as `sampling_of` takes them; session: of the visitor.

        Raises:
            UserError: nothing asked, a picture or a setting that cannot be used; the conversation is what it was.
        """
        text, files = (asked.get("text") or "").strip(), tuple(asked.get("files") or ())
        if not text:
            raise UserError("Write a question; a picture alone asks nothing.")
        sampling = sampling_of(settings, self.limits)
        pictures = load_pictures(files, self.limits)
        turn = Turn(text, files, pictures, tuple(Reply() for _ in self.talkers))
        running = self._running[session] = _Running()
        try:
            for grown in ask(self.talkers, conversation, turn, system, sampling, running.stop):
                if running.is_dropped:
                    return
                yield grown
        finally:
            running.stop.set()
            running.ended.set()
            if self._running.get(session) is running:
                del self._running[session]

    def stop(self, session: str) -> None:
        """End the visitor's answer where it is."""
        if (running := self._running.get(session)) is not None:
            running.stop.set()

    def drop(self, session: str) -> None:
        """End the visitor's answer, and show nothing more of it."""
        if (running := self._running.get(session)) is not None:
            running.is_dropped = True
            running.stop.set()
            running.ended.wait(_ENDING_S)

    def experts(self, conversation: Conversation) -> list[str]:
        """The HTML of each model's last answer."""
        found = [conversation.last_answer(model) for model in range(len(self.talkers))]
        return [
            "<p>No answer yet: ask something first.</p>" if last is None else experts_html(talker, *last)
            for talker, last in zip(self.talkers, found, strict=True)
        ]


def names_of(paths: Sequence[Path]) -> list[str]:
    """What the models are called: the directories' last names, and more of them where those are the same."""
    resolved = [path.resolve() for path in paths]
    for length in range(1, max(len(path.parts) for path in resolved) + 1):
        names = ["/".join(path.parts[-length:]) for path in resolved]
        if len(set(names)) == len(names):
            return names
    raise UserError(f"{paths[0]}: given twice; the second checkpoint is to be another one")


def sampling_of(settings: Sequence[Any], limits: Limits) -> Sampling:
    """From temperature, top_p, top_k, most new tokens and seed (None: another answer each time).

    Raises:
        UserError: a value that is none.
    """
    temperature, top_p, top_k, length, seed = settings
    try:
        length = min(int(length), limits.max_new_tokens)
        return Sampling(length, float(temperature), float(top_p), int(top_k), None if seed is None else int(seed))
    except (TypeError, ValueError) as error:
        raise UserError(f"settings: {error}") from error


def shown(conversation: Conversation, model: int) -> list[dict[str, Any]]:
    """One model's side of a conversation as Gradio's chat takes it: HTML, in which texts are escaped."""
    messages: list[dict[str, Any]] = []
    for turn in conversation.turns:
        files: list[Any] = [{"path": file} for file in turn.files]
        reply = turn.replies[model]
        messages.append({"role": "user", "content": [*files, escape(turn.question, quote=False)]})
        note = f"[{reply.note}]" if reply.note else ""
        if said := "\n".join(part for part in (reply.text, note) if part):
            messages.append({"role": "assistant", "content": escape(said, quote=False)})
    return messages


def build_page(talkers: Mapping[str, Talker], limits: Limits, examples: Sequence[Example]) -> gr.Blocks:
    """The page; `mount` makes it an application."""
    page = Page(talkers, limits)
    count = len(page.names)
    with gr.Blocks(
        title=f"{' and '.join(page.names)} · llava_compete", analytics_enabled=False, delete_cache=(3600, _KEPT_S)
    ) as blocks:
        conversation = gr.State(Conversation(), time_to_live=_KEPT_S)
        looks = gr.State(False)  # at the maps
        with gr.Tabs():
            with gr.Tab("Chat") as talking:
                with gr.Row():
                    chats = [_chat(name, number) for number, name in enumerate(page.names)]
                question = gr.MultimodalTextbox(
                    show_label=False,
                    file_types=["image"],
                    file_count="multiple",
                    placeholder="Drop pictures here and ask",
                    max_plain_text_length=100_000,
                    elem_id="question",
                )
                with gr.Row():
                    stop = gr.Button("Stop", elem_id="stop", min_width=100)
                    anew = gr.Button("New conversation", elem_id="anew", min_width=100)
                system, settings = _settings(limits)
                if examples:
                    gr.Examples([[example] for example in examples], [question], label="Examples")
            with gr.Tab("Experts") as looking, gr.Row():
                maps = [_map(name, number, count) for number, name in enumerate(page.names)]

        def answer(
            asked: Any, so_far: Any, wanted: Any, temperature: Any, top_p: Any, top_k: Any, length: Any, seed: Any,
            request: gr.Request,
        ) -> Iterator[tuple[Any, ...]]:  # fmt: skip
            values = (temperature, top_p, top_k, length, seed)
            try:
                grown = page.answer(asked, so_far, wanted or "", values, request.session_hash or "")
                for number, each in enumerate(grown):
                    # The box is emptied once the question is accepted; what is typed meanwhile stays.
                    box = gr.update(value=None) if number == 0 else gr.skip()
                    yield (box, each, *(shown(each, model) for model in range(count)))
            except UserError as error:
                gr.Warning(str(error), duration=None, title="Not asked")
                yield tuple(gr.skip() for _ in range(2 + count))

        def maps_of(so_far: Conversation, does_look: bool) -> Any:
            found = page.experts(so_far) if does_look else [gr.skip()] * count
            return found if count > 1 else found[0]

        def forget(request: gr.Request) -> tuple[Any, ...]:
            page.drop(request.session_hash or "")
            return (Conversation(), *([] for _ in range(count)), *("" for _ in range(count)))

        private: dict[str, Any] = {"api_visibility": "private"}
        quick: dict[str, Any] = {**private, "queue": False, "show_progress": "hidden"}
        answered = question.submit(
            answer,
            [question, conversation, system, *settings],
            [question, conversation, *chats],
            show_progress="minimal",
            concurrency_limit=1,
            **private,
        )
        # Drawn where they are looked at, and not behind each answer.
        answered.then(maps_of, [conversation, looks], maps, **private)
        looking.select(lambda: True, None, looks, **quick).then(maps_of, [conversation, looks], maps, **private)
        talking.select(lambda: False, None, looks, **quick)
        stop.click(_session_of(page.stop), None, None, **quick)
        gr.on([anew.click, *(chat.clear for chat in chats)], forget, None, [conversation, *chats, *maps], **quick)
        blocks.unload(_session_of(page.stop))
    blocks.queue(max_size=MOST_WAITING, api_open=False)
    return blocks


def mount(blocks: gr.Blocks, limits: Limits) -> FastAPI:
    """The page as an application, at /. Uploads of more bytes than `limits` allows get status 413."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    return gr.mount_gradio_app(
        app,
        blocks,
        path="/",
        max_file_size=limits.image_bytes,
        theme=gr.themes.Base(),
        css=_CSS,
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        ssr_mode=False,
        show_error=False,
    )


def _chat(name: str, number: int) -> gr.Chatbot:
    return gr.Chatbot(
        label=name,
        elem_id=f"chat{number}",
        height="55vh",
        min_width=320,
        render_markdown=False,  # what a model writes is text, and no markup of the page's
        feedback_options=None,
        buttons=["copy"],
    )


def _map(name: str, number: int, count: int) -> gr.HTML:
    with gr.Column(min_width=320):
        if count > 1:
            gr.Markdown(f"### {name}")
        return gr.HTML(elem_id=f"maps{number}")


def _settings(limits: Limits) -> tuple[Any, list[Any]]:
    """The system prompt, and the settings in the order of `sampling_of`."""
    given = Sampling()
    with gr.Accordion("How to answer", open=False):
        system = gr.Textbox(label="System prompt", lines=1)
        with gr.Row():
            temperature = gr.Slider(0, 2, given.temperature, step=0.05, label="Temperature (0: the likeliest token)")
            top_p = gr.Slider(0.05, 1, given.top_p, step=0.05, label="Top p (1: among all)")
            top_k = gr.Slider(0, 200, given.top_k, step=1, label="Top k (0: among all)")
        with gr.Row():
            most = limits.max_new_tokens
            length = gr.Slider(1, most, min(given.max_new_tokens, most), step=1, label="Most new tokens")
            seed = gr.Number(value=None, precision=0, label="Seed of the draws (empty: another answer each time)")
    return system, [temperature, top_p, top_k, length, seed]


def _session_of(act: Callable[[str], None]) -> Callable[..., None]:
    """An event that acts on the visitor's session."""

    def event(request: gr.Request) -> None:
        act(request.session_hash or "")

    return event
