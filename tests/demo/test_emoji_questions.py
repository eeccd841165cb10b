"""Questions about emoji, from pictures made here: true, apart from training by vendor and by thing, always the same."""

import importlib.util
import json
from collections import Counter, defaultdict

import pyarrow.parquet as pq
import pytest
from PIL import Image

from llava_compete.cli import main
from llava_compete.data.records import parse_row
from llava_compete.demo.emoji import build
from llava_compete.demo.emoji.table import KINDS, VENDORS, held_out, main_colour, read_others, read_things, with_article
from llava_compete.evaluation.config import EVAL_ROOT

RED, GREEN, BLUE = (220, 30, 30, 255), (40, 170, 60, 255), (40, 80, 220, 255)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Every thing by four vendors; each picture has a colour of its own, main or not."""
    folder = tmp_path_factory.mktemp("emoji")
    entries = []
    for number, names in enumerate(KINDS.values()):
        for index, name in enumerate(names):
            code, images = f"{number}-{index}", {}
            for vendor in (*VENDORS, "openmoji"):
                path = folder / f"images/{vendor}/{code}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                image = Image.new("RGBA", (24, 28), (RED, GREEN, BLUE)[(index + len(images)) % 3])
                image.putpixel((number, index), (index, len(images), number, 255))
                image.save(path, compress_level=1)
                images[vendor] = f"images/{vendor}/{code}.png"
            entries.append({"code": code, "name": name.title() if index else f"{name} face", "images": images})
    for number in range(6):  # beside the things: nobody asks for their names
        other = {vendor: f"images/{vendor}/z{number}.png" for vendor in (*VENDORS, "openmoji")}
        for place, path in enumerate(other.values()):
            image = Image.new("RGBA", (24, 28), (RED, GREEN, BLUE)[number % 3])
            image.putpixel((number, place), (number, place, 99, 255))
            image.save(folder / path, compress_level=1)
        entries.append(
            {"code": f"z{number}", "name": f"grinning {number}", "group": "smileys-emotion", "images": other}
        )
    (folder / "emoji.json").write_text(json.dumps(entries))
    return folder


@pytest.fixture(scope="module")
def built(pictures, tmp_path_factory):
    out = tmp_path_factory.mktemp("questions") / "emoji"
    assert build.build_emoji(out, pictures).built
    assert not build.build_emoji(out, pictures).built
    return out


def test_training_shows_neither_the_fourth_vendor_nor_unseen_things(built, pictures):
    things = read_things(pictures)
    others = read_others(pictures, things)
    unseen = held_out(things)
    unseen_others = held_out(others)
    assert len(things) == 144
    assert len(unseen) == 51
    assert len(unseen_others) == 2
    everything = [*things, *others]
    hidden = {path for thing in everything for path in thing.images.values() if thing.name in unseen | unseen_others}
    looked_at = set()
    for name in ("names", "captions", "instruct"):
        rows = json.loads((built / f"{name}.json").read_text())
        assert len({row["id"] for row in rows}) == len(rows)
        for row in rows:
            shown = parse_row(row, "?").images
            assert not any("openmoji" in image or image in hidden for image in shown)
            assert all((pictures / image).is_file() for image in shown)
            looked_at |= {image for image in shown if "/z" in image}
            if row["id"].startswith("text-"):  # Python's own words, such as key
                continue
            said = {word.strip(".,?:").lower() for turn in row["conversations"] for word in turn["value"].split()}
            assert not said & unseen
    named = {row["conversations"][1]["value"] for row in json.loads((built / "names.json").read_text())}
    assert named == {thing.name for thing in things} - unseen
    assert looked_at
    assert any("image" not in row for row in rows)
    assert {len(parse_row(row, "?").images) for row in rows} == {0, 1, 2, 4}


def test_answers_are_true_and_balanced(built, pictures):
    things = read_things(pictures)
    kind_of = {thing.name: thing.kind for thing in things}
    meta = json.loads((built / "eval/meta.json").read_text())["tasks"]
    everything = [*things, *read_others(pictures, things)]
    drawn = {(pictures / path).read_bytes(): path for thing in everything for path in thing.images.values()}
    for task, types in build.TESTS.items():
        rows = pq.read_table(built / f"eval/{task}_test.parquet").to_pylist()
        assert meta[task]["n"] == len(rows)
        answers = defaultdict(Counter)
        for row in rows:
            shown, names = [drawn[image["bytes"]] for image in row["images"]], row["things"].split(", ")
            assert ("openmoji" in shown[0]) == (task != "emoji_new")
            answers[row["type"]][row["answer"]] += 1
            match row["type"]:
                case "name" | "describe":
                    assert [row["answer"]] == names
                case "kind":
                    assert row["answer"] == kind_of[names[0]]
                case "yes_no":
                    asked = row["question"].rstrip("?").split()[-1]
                    assert (row["answer"] == "yes") == (asked in (names[0], kind_of[names[0]]))
                case "same":
                    assert (row["answer"] == "yes") == (names[0] == names[1])
                    assert shown[0] != shown[1]
                case "odd":
                    kinds = [kind_of[name] for name in names]
                    assert Counter(kinds)[kinds[("first", "second", "third", "fourth").index(row["answer"])]] == 1
                    assert sorted(Counter(kinds).values()) == [1, 3]
                case "colour":
                    assert row["answer"] == main_colour(pictures / shown[0])
        assert set(answers) == set(types)
        for kind in set(answers) & {"yes_no", "same", "odd"}:
            assert max(answers[kind].values()) - min(answers[kind].values()) <= 1


def test_the_same_every_time(built, pictures, tmp_path):
    build.build_emoji(tmp_path / "again", pictures)
    for path in (path for path in built.rglob("*") if path.is_file()):
        assert path.read_bytes() == (tmp_path / "again" / path.relative_to(built)).read_bytes()


def test_a_folder_without_pictures_and_a_missing_vendor_are_one_line(pictures, tmp_path, capsys):
    assert main(["data", "emoji", "--pictures", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "fetch the pictures first: llava-compete fetch emoji" in capsys.readouterr().err
    entries = json.loads((pictures / "emoji.json").read_text())
    del entries[3]["images"]["google"]
    (tmp_path / "emoji.json").write_text(json.dumps(entries))
    (tmp_path / "images").symlink_to(pictures / "images")
    assert main(["data", "emoji", "--pictures", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "no picture of 'cow' (0-3) by google" in capsys.readouterr().err
    (tmp_path / "emoji.json").write_text(json.dumps(entries[4:]))
    assert main(["data", "emoji", "--pictures", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "has no cat, cow, dog, horse; fetch the pictures again" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_names_have_their_articles():
    words = {"owl": "an owl", "grapes": "grapes", "bus": "a bus", "bread": "bread", "unicorn": "a unicorn",
             "ewe": "a ewe", "octopus": "an octopus"}  # fmt: skip
    assert {word: with_article(word) for word in words} == words


@pytest.mark.parametrize(
    ("kind", "answer", "said", "right"),
    [
        ("same", "yes", "dog and dog: yes", 1.0),
        ("same", "yes", "dog and yes: no", 0.0),
        ("odd", "third", "animal, animal, tool, animal: third.", 1.0),
        ("name", "t-rex", " T-Rex.", 1.0),
        ("name", "cat", "a cat", 0.0),
        ("describe", "t-rex", "A t-rex, which is an animal.", 1.0),
        ("describe", "cat", "A cattle, which is an animal.", 0.0),
        ("kind", "food", "", 0.0),
    ],
)
def test_scores(kind, answer, said, right):
    spec = importlib.util.spec_from_file_location("emoji", EVAL_ROOT / "tasks" / "emoji.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.score({"type": kind, "answer": answer, "id": "1"}, [said])["accuracy"]["score"] == right


def test_colours_are_those_of_the_visible_pixels(tmp_path):
    image = Image.new("RGBA", (24, 24), (0, 0, 0, 0))
    image.paste((250, 220, 40, 255), (0, 0, 12, 12))
    image.save(tmp_path / "a.png")
    assert main_colour(tmp_path / "a.png") == "yellow"
    Image.new("RGBA", (24, 24), (0, 0, 0, 0)).save(tmp_path / "empty.png")
    assert main_colour(tmp_path / "empty.png") is None
