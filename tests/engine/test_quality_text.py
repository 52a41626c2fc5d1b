"""The two halves of the built-in text: fixed, equal, disjoint, two thirds prose."""

import re

import pytest

from engine.errors import QualityError
from engine.quality import text


def paragraphs(documents):
    return {" ".join(p.split()) for d in documents for p in re.split(r"\n\s*\n", d) if len(p) > 60}


def test_the_halves_share_no_paragraph_and_have_one_size():
    calibration, heldout = text.calibration_documents(), text.heldout_documents()
    assert not paragraphs(calibration) & paragraphs(heldout)
    sizes = [sum(map(len, half)) for half in (calibration, heldout)]
    assert min(sizes) > 200_000
    assert max(sizes) < 1.1 * min(sizes)


@pytest.mark.parametrize("documents", [text.calibration_documents, text.heldout_documents])
def test_any_stretch_is_about_two_thirds_prose(documents):
    code = re.compile(r"^\s*(def|class|return|import|from|self\.\w+ =|if .*:$)", re.MULTILINE)
    half = documents()
    assert max(map(len, half)) < 12_000
    for start in range(0, len(half) - 30, 30):
        stretch = half[start : start + 30]
        share = sum(len(d) for d in stretch if len(code.findall(d)) > len(d) / 250) / sum(map(len, stretch))
        assert 0.1 < share < 0.6


def test_the_text_is_the_same_in_every_run():
    first = text.content_sha256(text.heldout_documents())
    text._halves.cache_clear()
    assert text.content_sha256(text.heldout_documents()) == first
    assert text.content_sha256(text.calibration_documents()) != first


def test_the_hash_knows_the_borders():
    assert text.content_sha256(["ab", "c"]) != text.content_sha256(["a", "bc"])


def test_a_file_of_ones_own(tmp_path):
    path = tmp_path / "t.txt"
    path.write_text("Grüße\n", encoding="utf-8")
    assert text.documents_of_file(path) == ["Grüße\n"]
    for content, message in ((b"\xff\xfe", "UTF-8"), (b" \n", "is empty")):
        path.write_bytes(content)
        with pytest.raises(QualityError, match=message):
            text.documents_of_file(path)
    with pytest.raises(QualityError, match="cannot be read"):
        text.documents_of_file(tmp_path / "none.txt")
