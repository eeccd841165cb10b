"""Pictures for the README: the page after a question, and the map of its experts.

python tests/page_pictures.py CHECKPOINT DATA ROW FOLDER
writes FOLDER/page.png and FOLDER/patch_map.png, with the first question of row number ROW of DATA (as `report --data`).
Needs a Chromium on PATH, such as Debian's.
"""

from __future__ import annotations

import base64
import io
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from page_kit import chromium, chromium_path, served
from PIL import Image

from llava_compete.evaluation.routing_data import Rows
from llava_compete.talk.examples import data_examples
from llava_compete.talk.limits import Limits
from llava_compete.talk.talker import load_talker

WIDTH = 1000  # pixels
COLORS = 256  # of the palette: a third of the bytes


def save(content: bytes, file: Path) -> None:
    picture = Image.open(io.BytesIO(content)).convert("RGB")
    if picture.width > WIDTH:
        picture = picture.resize((WIDTH, round(picture.height * WIDTH / picture.width)), Image.Resampling.LANCZOS)
    picture.quantize(COLORS, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(file, optimize=True)
    print(f"{file}: {picture.width} x {picture.height}, {file.stat().st_size:,} bytes")


def main(checkpoint: str, data: str, number: str, folder: str) -> None:
    path = chromium_path()
    if path is None:
        sys.exit("needs a Chromium on PATH (Debian: apt-get install chromium)")
    row = Rows([Path(data)])[int(number)].first_exchange()
    talkers = {Path(checkpoint).name: load_talker(checkpoint)}
    with TemporaryDirectory() as scratch, chromium(path) as browser:
        examples = data_examples(Path(data), Path(scratch))
        files = []
        for place, picture in enumerate(row.images):
            files.append(str(Path(scratch) / f"asked{place}.png"))
            picture.save(files[-1])
        with served(talkers, Limits(), examples) as address:
            tab = browser.new_page(viewport={"width": WIDTH, "height": 860})
            tab.set_default_timeout(120_000)
            tab.goto(address)
            if files:
                tab.set_input_files("#question input[type=file]", files)
                tab.wait_for_selector("#question .thumbnail-item")
            tab.fill("#question textarea", row.question.replace("<image>", "").strip())
            tab.press("#question textarea", "Enter")
            tab.wait_for_selector("#chat0 .bot.message")
            tab.wait_for_function("document.querySelector('#question textarea').value === ''")
            tab.wait_for_timeout(3000)  # the answer's end
            save(tab.screenshot(), Path(folder) / "page.png")
            tab.get_by_role("tab", name="Experts").click()
            tab.wait_for_selector("#maps0 img.map")
            source = tab.locator("#maps0 img.map").first.get_attribute("src")
            save(base64.b64decode(source.partition(",")[2]), Path(folder) / "patch_map.png")


if __name__ == "__main__":
    main(*sys.argv[1:])
