"""64 scenes with captions and questions, as files of the demo's training: what a few steps of its stages read.

python scripts/lib/few_scenes.py OUT

All of the demo's data (`llava-compete data demo`) are 8,000 pictures, whose making and reading takes longer than the
steps.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

from llava_compete.demo import scenes
from llava_compete.demo.build import CAPTION_PROMPTS, llava_turns, png_bytes

COUNT = 64


def main(out: Path) -> None:
    rng, captions, questions = random.Random(0), [], []
    (out / "images").mkdir(parents=True)
    for number in range(COUNT):
        scene, name = scenes.sample_scene(rng), f"{number}.png"
        (out / "images" / name).write_bytes(png_bytes(scenes.render(scene)))
        row = {"id": str(number), "image": name}
        prompt = CAPTION_PROMPTS[number % len(CAPTION_PROMPTS)]
        captions.append({**row, "conversations": llava_turns([(prompt, scenes.caption(scene))])})
        asked = scenes.sample_conversation(rng, scene, max_turns=4)
        questions.append({**row, "conversations": llava_turns([(item.text, item.answer) for item in asked])})
    (out / "pretrain.json").write_text(json.dumps(captions))
    (out / "instruct.json").write_text(json.dumps(questions))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
