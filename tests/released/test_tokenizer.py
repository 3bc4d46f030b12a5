"""Ids of texts: those that open_clip gives, recorded here, and asked anew where it is installed."""

import gzip
import importlib.util
import json
import pickle
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from pictures import complaint
from texts import odd_strings

from dinov3_infer import InputTypeError, UnsupportedError
from dinov3_infer.released import tokenizer
from dinov3_infer.released.dinotxt import clip_templates
from dinov3_infer.released.tokenizer import END, START, Tokenizer, vocabulary

RECORDED = Path(__file__).with_name("clip_ids.json")  # text -> ids of open_clip 3.3.0, without those of padding


def peer(name: str) -> ModuleType:
    """A module of open_clip by itself: the package imports much that is not needed here."""
    spec = importlib.util.find_spec("open_clip")
    if spec is None or spec.origin is None:
        pytest.skip("needs open_clip_torch (see CONTRIBUTING)")
    path = Path(spec.origin).with_name(f"{name}.py")
    found = importlib.util.spec_from_file_location(f"open_clip_{name}", path)
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def test_ids_are_those_that_were_recorded() -> None:
    """Letters of many writings, digits, entities, mojibake, controls, texts that are cut, and none at all."""
    recorded = json.loads(RECORDED.read_text(encoding="utf-8"))
    assert len(recorded) >= 100
    ids = Tokenizer()(list(recorded))
    assert ids.shape == (len(recorded), 77) and ids.dtype == torch.int64
    for text, row, expected in zip(recorded, ids.tolist(), recorded.values(), strict=True):
        assert row == expected + [0] * (77 - len(expected)), text


def test_a_few_by_hand() -> None:
    one = Tokenizer()
    assert one("a photo of a cat.")[0, :9].tolist() == [49406, 320, 1125, 539, 320, 2368, 269, 49407, 0]
    assert one.encode("photo of a tupperware") == [1125, 539, 320, 764, 6719, 4476]
    assert one("")[0, :3].tolist() == [START, END, 0]
    assert one([]).shape == (0, 77)
    long = one("cat " * 100)[0]
    assert long[0] == START and long[-1] == END and (long[1:-1] == 2368).all()
    assert one("cat " * 100, context_length=5).tolist() == [[START, 2368, 2368, 2368, END]]
    assert one.tokenize("a cat").equal(one(["a cat"])), "Meta's name for it"


def test_the_vocabulary() -> None:
    """Every id spells something else, and a text comes back from its ids."""
    spelled, merges = vocabulary()
    assert len(spelled) == 49408 and len(merges) == 48894 == len(set(merges.values()))
    one = Tokenizer()
    assert one.decode(one.encode("Two   DOGS &amp; one café, 1234! 日本")) == "two dogs & one café , 1 2 3 4 ! 日本 "
    assert one.decode([START, 320, 2368, END]) == "<start_of_text>a cat <end_of_text>"
    assert pickle.loads(pickle.dumps(one)).encode("a cat") == [320, 2368]  # a worker of a DataLoader may have one


def test_what_is_no_text() -> None:
    assert complaint(InputTypeError, lambda: Tokenizer()(["a", 3])) == (  # type: ignore[list-item]
        "a text is a str, got int; give one str or a list of them"
    )


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    """One sentence says what to install."""
    tokenizer._words_of.cache_clear()
    monkeypatch.setitem(sys.modules, "ftfy", None)
    text = complaint(UnsupportedError, lambda: Tokenizer()("a cat"))
    assert text == "texts need ftfy, which is not installed; pip install 'dinov3-infer[text]'"
    monkeypatch.undo()
    assert Tokenizer().encode("a cat") == [320, 2368]


def test_nothing_else_needs_the_extra() -> None:
    """The package, every head and the command import without it."""
    script = (
        "import sys\nsys.modules['ftfy'] = sys.modules['regex'] = None\n"
        "import dinov3_infer, dinov3_infer.released.attach, dinov3_infer.torchhub, dinov3_infer.cli.classify\n"
        "print(dinov3_infer.load_head.__name__)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.stdout == "load_head\n", done.stderr


@pytest.mark.peers
def test_ids_of_ten_thousand_odd_strings() -> None:
    theirs, ours = peer("tokenizer").SimpleTokenizer(), Tokenizer()
    texts = odd_strings(10_000)
    assert len(set(texts)) == 10_000
    differ = [text for text, row in zip(texts, ours(texts) != theirs(texts), strict=True) if row.any()]
    assert not differ, [ascii(text) for text in differ[:3]]


@pytest.mark.peers
def test_the_files_are_clips() -> None:
    """The merges are the ones in use of its file, and the sentences are its 80 in their order."""
    theirs = peer("tokenizer")
    lines = gzip.decompress(Path(theirs.default_bpe()).read_bytes()).decode().split("\n")
    assert gzip.decompress(tokenizer._MERGES.read_bytes()).decode() == "\n".join(lines[1:48895])
    assert [make("{}") for make in peer("zero_shot_metadata").OPENAI_IMAGENET_TEMPLATES] == list(clip_templates())
