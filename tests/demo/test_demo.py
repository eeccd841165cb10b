"""The demo data and the harder scenes: truthful, balanced, separate, the same every time."""

import io
import json
import random
from collections import Counter, defaultdict

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from llava_compete.cli import main
from llava_compete.data.records import parse_row
from llava_compete.demo import build as demo
from llava_compete.demo import scenes, scenes_hard


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "data"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "NUM_CAPTION_SCENES", 30)
        patch.setattr(demo, "NUM_INSTRUCT_SCENES", 60)
        assert demo.build_demo(out).built
        first = {path.relative_to(out): path.read_bytes() for path in out.rglob("*.*") if path.is_file()}
        assert not demo.build_demo(out).built
        demo.build_demo(out, force=True)
    again = {path.relative_to(out): path.read_bytes() for path in out.rglob("*.*") if path.is_file()}
    assert first == again
    return out


def test_layout_and_rows(built):
    meta = json.loads((built / "eval/meta.json").read_text())
    for name in ("pretrain", "instruct"):
        rows = json.loads((built / f"{name}.json").read_text())
        assert len(rows) == meta["rows"][name]
        assert len({row["id"] for row in rows}) == len(rows)
        for row in rows:
            conversation = parse_row(row, "?")
            assert all((built / "images" / image).is_file() for image in conversation.images)
    instruct = json.loads((built / "instruct.json").read_text())
    assert any("image" not in row for row in instruct)
    assert any(len(row["conversations"]) > 2 for row in instruct if "image" in row)
    digits = [row for row in instruct if row["id"].startswith("digit")]
    assert len(digits) == 1397


@pytest.mark.parametrize("command", [["demo"], ["scenes-hard", "--train-images", "2"]])
def test_a_folder_of_something_else_is_never_replaced(command, tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("years of work")
    assert main(["data", *command, "--force", "--out", str(tmp_path)]) == 2
    assert "was not made by this command" in capsys.readouterr().err
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_tests_are_balanced_and_apart_from_training(built):
    meta = json.loads((built / "eval/meta.json").read_text())["tasks"]
    trained = {path.read_bytes() for path in built.rglob("*.png")}
    for task, name in (("demo_digits", "digits"), ("demo_scenes", "scenes")):
        rows = pq.read_table(built / f"eval/{name}_test.parquet").to_pylist()
        assert len(rows) == meta[task]["n"] == 400
        assert not trained & {row["image"]["bytes"] for row in rows}
        assert Image.open(io.BytesIO(rows[0]["image"]["bytes"])).size == (48, 48)
        answers = Counter(row["answer"] for row in rows)
        assert meta[task]["chance"] == max(answers.values()) / 400
        by_type = defaultdict(Counter)
        for row in rows:
            by_type[row["type"]][row["answer"]] += 1
        if name == "scenes":
            assert set(by_type) == set(scenes.QUESTION_KINDS)
            for kind, counts in by_type.items():
                assert set(counts) == set(scenes.QUESTION_KINDS[kind].answers)
                assert max(counts.values()) - min(counts.values()) <= 1


def test_killed_build_is_built_again(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "NUM_CAPTION_SCENES", 5)
    monkeypatch.setattr(demo, "NUM_INSTRUCT_SCENES", 5)
    out = tmp_path / "data"
    with monkeypatch.context() as patch:
        patch.setattr(demo, "write_test_table", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            demo.build_demo(out)
    assert not out.exists()
    assert main(["data", "demo", "--out", str(out)]) == 0
    assert (out / "eval/meta.json").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def pixel_colors(scene):
    """Colours at the objects' centres, read off the picture."""
    image = scenes.render(scene)
    return [image.getpixel((thing.x, thing.y)) for thing in scene.things]


def test_pictures_show_what_the_scene_says():
    rng = random.Random(0)
    for _ in range(50):
        scene = scenes.sample_scene(rng)
        assert pixel_colors(scene) == [scenes.COLORS[thing.color] for thing in scene.things]
        assert [thing.x for thing in scene.things] == sorted(thing.x for thing in scene.things)


def truth(question, scene):
    """The answer worked out from the question's words alone, for both generators' simple questions."""
    things = list(getattr(scene, "things", scene))
    words = question.rstrip("?").split()
    named = {f"{thing.color} {thing.shape}": thing for thing in things}
    if question == "How many objects are there?":
        return str(len(things))
    if question.startswith("What color is the ") and len(words) == 5:
        return next(thing.color for thing in things if thing.shape == words[-1])
    if question.startswith("What shape is the "):
        return next(thing.shape for thing in things if thing.color == words[4])
    if question.startswith("Is there a "):
        return "yes" if " ".join(words[3:]) in named else "no"
    if question.startswith("How many ") and question.endswith("objects are there?"):
        return str(sum(words[2] in (thing.color, thing.shape) for thing in things))
    if question.startswith("Are there more "):
        one, other = (sum(word in (t.color, t.shape) for t in things) for word in (words[3], words[5]))
        return "yes" if one > other else "no"
    return None


def test_answers_are_true():
    rng, checked = random.Random(1), Counter()
    for _ in range(300):
        for scene, kinds in (
            (scenes.sample_scene(rng), {name: kind.ask for name, kind in scenes.QUESTION_KINDS.items()}),
            (scenes_hard.sample_scene(rng), {name: kind.ask for name, kind in scenes_hard.KINDS.items()}),
        ):
            for name, ask in kinds.items():
                asked = ask(rng, scene)
                if asked is None:
                    continue
                text, answer = asked[-2:]
                expected = truth(text, scene)
                if expected is not None:
                    assert answer == expected, (text, scene)
                    checked[name] += 1
    assert set(checked) >= {"color", "shape", "count", "existence", "compare"}


def place(column, row, color="red", shape="circle", digit=None):
    return scenes_hard.Thing(color, shape, column, row, 5, digit)


def answers_of(kind, scene):
    """Every question that a kind can ask of a scene, with its answer."""
    rng = random.Random(0)
    asked = (scenes_hard.KINDS[kind].ask(rng, scene) for _ in range(400))
    return dict(item for item in asked if item)


def test_compositions_on_a_scene_worked_out_by_hand():
    scene = (
        place(0, 0, "red", "circle"),
        place(2, 1, "blue", "square"),
        place(1, 3, "green", "cross"),
        place(3, 2, "red", "digit", digit=4),
        place(0, 2, "blue", "digit", digit=9),
    )
    assert answers_of("sum", scene) == {"What is the sum of the digits?": "13"}
    assert answers_of("digit", scene) == {
        "Which digit is on the red tile?": "4",
        "Which digit is on the blue tile?": "9",
    }
    extremes = answers_of("extreme", scene)
    assert extremes["What color is the rightmost object?"] == "red"
    assert extremes["What color is the lowest object?"] == "green"
    assert "What color is the leftmost object?" not in extremes  # two of them
    assert answers_of("count_relation", scene)["How many objects are below the blue square?"] == "3"
    two = answers_of("two_relations", scene)
    assert two["What color is the object right of the green cross and below the blue square?"] == "red"
    assert answers_of("same", scene)["Do the rightmost and the topmost object have the same color?"] == "yes"
    relations = answers_of("relation", scene)
    assert relations["Is the red circle left of the green cross?"] == "yes"
    assert relations["Is the red circle below the green cross?"] == "no"


def test_a_caption_names_all_objects_in_reading_order():
    scene = (place(3, 2, "red", "digit", digit=4), place(0, 2, "blue", "square"), place(1, 0, "green", "cross"))
    assert scenes_hard.caption(scene) == "green cross at 2,1; blue square at 1,3; red 4 at 4,3"
    turns = dict(turn for seed in range(20) for turn in scenes_hard.describe(random.Random(seed), scene))
    assert turns["What is at 4,3?"] == "red 4"
    assert turns["Where is the blue square?"] == "1,3"
    two = (*scene, place(2, 2, "blue", "square"))
    asked = [prompt for seed in range(20) for prompt, _ in scenes_hard.describe(random.Random(seed), two)]
    assert "Where is the blue square?" not in asked


def test_unseen_pairs_stay_out_of_training():
    rng = random.Random(2)
    for _ in range(300):
        scene = scenes_hard.sample_scene(rng)
        assert not {(thing.color, thing.shape) for thing in scene} & scenes_hard.UNSEEN
        for question, _ in scenes_hard.sample_conversation(rng, scene, 3):
            assert not scenes_hard.names_unseen(question)
    for scene, question, _, _ in scenes_hard.sample_test(rng, ["relation", "existence"], 20, unseen=True):
        assert {(thing.color, thing.shape) for thing in scene} & scenes_hard.UNSEEN
        assert scenes_hard.names_unseen(question)


def test_hard_benchmark_is_balanced(tmp_path, monkeypatch):
    monkeypatch.setattr(scenes_hard, "NUM_TEST", 120)
    scenes_hard.build_scenes_hard(tmp_path / "hard", train_images=20)
    captions, questions = (
        json.loads((tmp_path / f"hard/{name}.json").read_text()) for name in ("pretrain", "instruct")
    )
    assert len(captions) == 20
    assert {row["image"] for row in questions} <= {row["image"] for row in captions}
    meta = json.loads((tmp_path / "hard/eval/meta.json").read_text())
    assert set(meta["tasks"]) == {"demo_hard_1", "demo_hard_2", "demo_hard_3", "demo_hard_unseen"}
    for facts in meta["tasks"].values():
        rows = pq.read_table(tmp_path / "hard/eval" / facts["file"]).to_pylist()
        assert len(rows) == facts["n"] == 120
        by_type = defaultdict(Counter)
        for row in rows:
            by_type[row["type"]][row["answer"]] += 1
        spread = [max(c.values()) - min(c[a] for a in scenes_hard.KINDS[k].answers) for k, c in by_type.items()]
        assert max(spread) <= 1
        assert np.asarray(Image.open(io.BytesIO(rows[0]["image"]["bytes"]))).shape == (64, 64, 3)
