"""Ids of conversations on real tokenizers, against encoders that are not ours.

References: mistral-common's encoder (v1, v3, tekken), llama-models' ChatFormat (Llama 3), the chat templates that
Qwen 3, Gemma 3 and SmolLM2 bring, rendered and tokenised by transformers, and published ids of Phi-3 and Vicuna.
"""

import pytest
from transformers import AutoTokenizer

from llava_compete.data.text.rows import token_byte_lengths
from llava_compete.language.chat_encoding import encode_answer, encode_conversation, stop_token_ids
from llava_compete.language.config import LanguageModelSection
from llava_compete.language.sources import load_tokenizer

pytestmark = [pytest.mark.packages, pytest.mark.timeout(600)]


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


SYSTEM = {"role": "system", "content": "Be brief."}
CONVERSATIONS = {
    "one turn": [user("Hello"), assistant("Hi there")],
    "two turns": [user("a"), assistant("b"), user("Is it 1234?"), assistant("d e")],
    "system": [SYSTEM, user("Hello"), assistant("Hi there"), user(" two  spaces\nline"), assistant("ok \n x")],
    "white space": [user(" lead"), assistant("trail "), user("tab\t\n\nx "), assistant("  two lead")],
    "letters": [user("日本 é"), assistant("👩‍👩‍👧 ok")],
}
each_conversation = pytest.mark.parametrize("messages", CONVERSATIONS.values(), ids=CONVERSATIONS)
_loaded = {}


def tokenizer_of(folder, model_type, template=None):
    """As a stage loads it, with the placeholder and its chat template."""
    key = (folder, template)
    if key not in _loaded:

        class Config:
            pass

        config = Config()
        config.model_type = model_type
        section = LanguageModelSection(name=str(folder))
        _loaded[key] = load_tokenizer(section, None, config, chat_template=template)
    return _loaded[key]


def check_row(tokenizer, messages, row, prompt):
    """The whole row, the prompt of its last answer, the row beginning with that prompt, and the answer as scored."""
    encoded = encode_conversation(tokenizer, messages)
    assert encoded.input_ids == row
    assert encode_conversation(tokenizer, messages[:-1], add_generation_prompt=True).input_ids == prompt
    last = encoded.answers[-1]
    assert encoded.input_ids[: last.start] == prompt
    assert encode_answer(tokenizer, messages[:-1], messages[-1]["content"]) == (
        prompt,
        encoded.labels[last.start : last.answer_end],
    )


@pytest.mark.parametrize("version", ["v1", "v3", "tekken"])
@each_conversation
def test_mistral(version, messages, tokenizer_folders, references):
    """`tokenizer.model` alone is the whole folder of v1 and v3."""
    from mistral_common.protocol.instruct import messages as kinds
    from mistral_common.protocol.instruct.request import ChatCompletionRequest
    from mistral_common.protocol.instruct.validator import ValidationMode
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

    makers = {
        "v1": MistralTokenizer.v1,
        "v3": MistralTokenizer.v3,
        "tekken": lambda: MistralTokenizer.v3(is_tekken=True),
    }
    reference = makers[version]()
    classes = {"user": kinds.UserMessage, "assistant": kinds.AssistantMessage, "system": kinds.SystemMessage}

    def ids(messages, mode):
        reference._chat_completion_request_validator._mode = mode
        request = ChatCompletionRequest(messages=[classes[m["role"]](content=m["content"]) for m in messages])
        return reference.encode_chat_completion(request).tokens

    folder = tokenizer_folders / ("tekken" if version == "tekken" else f"mistral_{version}")
    tokenizer = tokenizer_of(folder, "mistral")  # the template is told apart by the control tokens
    row = ids(messages, ValidationMode.finetuning)
    check_row(tokenizer, messages, row, ids(messages[:-1], ValidationMode.test))


@each_conversation
def test_llama3(messages, tokenizer_folders, references):
    from llama_models.datatypes import RawMessage
    from llama_models.llama3.chat_format import ChatFormat
    from llama_models.llama3.tokenizer import Tokenizer

    reference = ChatFormat(Tokenizer.get_instance())
    tokenizer = tokenizer_of(tokenizer_folders / "llama3", "llama")
    prompt = reference.encode_dialog_prompt([RawMessage(**message) for message in messages[:-1]]).tokens
    row = reference.encode_dialog_prompt([RawMessage(**message) for message in messages]).tokens
    header = reference.encode_dialog_prompt([RawMessage(**messages[-1])]).tokens[-4:]
    assert row[-4:] == header  # the next answer's, which a prompt ends with and a row does not have
    check_row(tokenizer, messages, row[:-4], prompt)


@pytest.mark.parametrize(("name", "model_type"), [("qwen3", "qwen3"), ("gemma3", "gemma3_text"), ("smollm2", "llama")])
@each_conversation
def test_a_tokenizers_own_template(name, model_type, messages, tokenizer_folders, smollm2_folder):
    folder = smollm2_folder if name == "smollm2" else tokenizer_folders / name
    tokenizer = tokenizer_of(folder, model_type)
    if name == "smollm2" and messages is CONVERSATIONS["white space"]:
        pytest.skip("its template puts an answer's leading space into one token with the prompt's line break")
    options = {"return_dict": False, "enable_thinking": False}
    row = tokenizer.apply_chat_template(messages, **options)
    prompt = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, **options)
    check_row(tokenizer, messages, row, prompt)


@pytest.mark.parametrize(("name", "template"), [("qwen3", "qwen3"), ("gemma3", "gemma"), ("smollm2", "smollm2")])
@each_conversation
def test_our_template_is_the_tokenizers_own(name, template, messages, tokenizer_folders, smollm2_folder):
    folder = smollm2_folder if name == "smollm2" else tokenizer_folders / name
    own, ours = tokenizer_of(folder, "llama"), tokenizer_of(folder, "llama", template)
    assert own.chat_template != ours.chat_template
    assert encode_conversation(own, messages) == encode_conversation(ours, messages)
    assert stop_token_ids(own) == stop_token_ids(ours)


@each_conversation
def test_qwen2_5_is_chatml_with_its_own_system_turn(messages, tokenizer_folders):
    """The vocabulary is Qwen's tiktoken file; Qwen 3 has the same ids for all that both have."""
    tokenizer = tokenizer_of(tokenizer_folders / "qwen2.5", "qwen2")
    other = tokenizer_of(tokenizer_folders / "qwen3", "qwen3", "chatml")
    text = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
    with_system = messages if messages[0] is SYSTEM else [{"role": "system", "content": text}, *messages]
    assert encode_conversation(tokenizer, messages) == encode_conversation(other, with_system)


def test_phi3s_published_ids(tokenizer_folders):
    """<|user|>\\n and <|assistant|>\\n are one id each, and the words behind them begin with a space."""
    tokenizer = tokenizer_of(tokenizer_folders / "phi3", "phi3")
    messages = [user("Hello"), assistant("Sure"), user("Hello"), assistant("Sure")]
    hello, sure = tokenizer.convert_tokens_to_ids(["▁Hello", "▁Sure"])
    turn = [32010, hello, 32007, 32001, sure, 32007]
    check_row(tokenizer, messages, turn + turn, turn + turn[:4])
    assert encode_answer(tokenizer, messages[:1], "Sure") == (turn[:4], [sure])
    assert stop_token_ids(tokenizer) == [32000, 32007]


def test_vicunas_published_ids(tokenizer_folders):
    """LLaVA-1.5: "USER" behind "</s>" is one id; "ASSISTANT:" has the five that LLaVA's own code looks for."""
    tokenizer = tokenizer_of(tokenizer_folders / "llama2", "llama")
    messages = [user("hi"), assistant("hello"), user("hi"), assistant("hello")]
    ids = encode_conversation(tokenizer, messages).input_ids
    question = [29901, 7251]  # ":", "▁hi"
    answer = [319, 1799, 9047, 13566, 29901, 22172, 2]  # "▁A SS IST ANT : ▁hello </s>"
    first = [3148, 1001, *question, *answer]  # "▁US ER"
    assert ids[-len(first) - 10 :] == [*first, 11889, *question, *answer]  # "USER"
    assert encode_answer(tokenizer, messages[:1], "hello")[1] == [22172]


@pytest.mark.parametrize("name", ["llama2", "phi3", "gemma3", "llama3", "tekken", "qwen3"])
def test_bytes_of_tokens(name, tokenizer_folders):
    """What bits per byte are counted by; Llama 2 and Phi 3 write a space before a text."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folders / name)
    text = "naïve 日本 👩‍👩‍👧 Ġ  two\n\n\n\tlines, \uf8f0"
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert int(token_byte_lengths(tokenizer)[ids].sum()) == len(text.encode()) + (name in ("llama2", "phi3"))
