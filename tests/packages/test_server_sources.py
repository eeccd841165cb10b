"""The rules of `server_rules`, and what docs/serving.md says of two servers, against the sources in their wheels."""

from __future__ import annotations

import ast
import re
import sys
import types
from collections import deque
from collections.abc import Callable
from typing import Any
from unittest import mock

import jinja2
import pytest
from server_rules import NUM_EXPERTS
from tiny import tiny_model

from llava_compete.language.templates import TEMPLATES, read_template
from llava_compete.model import served
from llava_compete.moe.block import moe_blocks

pytestmark = [pytest.mark.packages, pytest.mark.timeout(1800)]

VLLM, SGLANG = "vllm", "sglang"
BACKEND = "vllm/model_executor/models/transformers"
Source = Callable[[str, str], str]


def constant(text: str, name: str) -> Any:
    """The literal that a module assigns to a name."""
    for node in ast.walk(ast.parse(text)):
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if any(getattr(target, "id", None) == name for target in targets):
            return ast.literal_eval(node.value)
    raise AssertionError(name)


def test_names_that_the_config_declares_experts_by(source: Source) -> None:
    aliases = constant(source(VLLM, "vllm/transformers_utils/config.py"), "CONFIG_FIELD_ALIASES")
    assert aliases["num_experts"] == NUM_EXPERTS
    assert aliases["num_experts_per_token"][0] == "num_experts_per_tok"
    assert aliases["moe_intermediate_size"][0] == "moe_intermediate_size"
    text = source(SGLANG, "sglang/srt/model_loader/utils.py")
    assert set(constant(text, "expert_attrs")) >= {"num_experts", "num_experts_per_tok", "moe_intermediate_size"}


def test_names_of_the_servers_attention(source: Source) -> None:
    text = source(VLLM, f"{BACKEND}/fusers/attention.py")
    assert constant(text, "VLLM_ATTN_IMPL") in served._SERVERS
    assert constant(text, "VLLM_MLA_ATTN_IMPL") in served._SERVERS
    assert '_attn_implementation = "sglang"' in source(SGLANG, "sglang/srt/models/transformers.py")
    assert "sglang" in served._SERVERS


def test_which_modules_are_taken_for_experts_and_how_they_are_called(source: Source) -> None:
    for text in (source(VLLM, f"{BACKEND}/moe.py"), source(SGLANG, "sglang/srt/models/transformers.py")):
        assert "len(params) > 0 and all(p.ndim == 3 for p in params)" in text
        assert re.search(r'child_name == (experts_name|"experts") and \(is_modulelist or is_3d\)', text)
        assert 'activation = "silu"' in text
        assert re.search(r"hidden_states: torch.Tensor,\s+topk_ids: torch.Tensor,\s+topk_weights: torch.Tensor", text)
    assert 'experts_name = "experts"' in source(VLLM, f"{BACKEND}/moe.py")


def test_how_the_backbone_is_built_and_called(source: Source) -> None:
    base, images = source(VLLM, f"{BACKEND}/base.py"), source(VLLM, f"{BACKEND}/multimodal.py")
    sglang = source(SGLANG, "sglang/srt/models/transformers.py")
    assert "AutoModel.from_config(" in base
    assert "AutoModel.from_config(" in sglang
    for text in (base, sglang):
        assert re.search(r"use_cache=False,\s+position_ids=[^\n]+\s+return_dict=False", text)
    assert "get_modality_features(pixel_values, return_dict=True, **kwargs)" in images
    assert "return features.pooler_output" in images
    assert 'mm_tokens["num_image_tokens"]' in images
    assert 'mm_tokens["num_image_patches"]' in images
    assert '"return_text_replacement_offsets": True' in images


def test_vllm_loads_packed_experts_and_sglang_does_not(source: Source) -> None:
    assert '"gate_up_proj"' in source(VLLM, "vllm/model_executor/layers/fused_moe/routed_experts.py")
    names = constant(source(SGLANG, "sglang/srt/models/transformers.py"), "ckpt_names")
    assert not any("gate_up" in name for row in names for name in row)


@pytest.mark.parametrize("trains", [True, False])
def test_the_fuser_keeps_our_router(source: Source, trains: bool) -> None:
    """vLLM's matcher, run on our block: no match, so that its fallback replaces the experts alone."""
    fx_utils = _run(source, f"{BACKEND}/fx_utils.py")
    fuser = _run(source, f"{BACKEND}/fusers/moe.py", {"vllm.model_executor.models.transformers.fx_utils": fx_utils})
    model, _ = tiny_model(moe={"language": {}})
    for block in moe_blocks(model.train(trains)).values():
        assert fuser.MoEBlockFuser.match(block, "experts") is None


def _run(source: Source, name: str, real: dict[str, types.ModuleType] | None = None) -> types.ModuleType:
    """A module of the wheel; what it imports from the rest of vLLM, which needs a GPU's libraries, is left empty."""
    text = source(VLLM, name)
    names = re.findall(r"^from (vllm[\w.]*) import", text, re.MULTILINE)
    empty = {other: mock.MagicMock(name=other) for other in names}
    module = types.ModuleType(name)
    module.__file__ = name
    with mock.patch.dict(sys.modules, {"vllm": mock.MagicMock(), **empty, **(real or {})}):
        sys.modules[name] = module
        exec(compile(text, name, "exec"), module.__dict__)
    return module


def test_servers_hand_lists_of_parts_to_our_templates(source: Source) -> None:
    text = source(VLLM, "vllm/renderers/hf.py")
    begins = ("_is_", "_attr_", "_iter_", "_try_")
    found = [node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)]
    wanted = [node for node in found if node.name.startswith(begins) and "jinja2" in ast.unparse(node)]
    wanted += [node for node in found if node.name == "_try_extract_ast"]
    space: dict[str, Any] = {"jinja2": jinja2, "deque": deque, "logger": mock.MagicMock()}
    exec(compile("from __future__ import annotations\n" + "\n".join(map(ast.unparse, wanted)), "hf.py", "exec"), space)
    for name in TEMPLATES:
        parsed = space["_try_extract_ast"](read_template(name))
        assert next(space["_iter_nodes_assign_content_item"](parsed), None) is not None, name
        assert "image" in read_template(name)  # SGLang's own sign
