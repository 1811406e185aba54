"""Web pages and notebooks as text."""

import io
import json
from typing import Any

import pytest

from gptcore.corpus.formats import ReadOptions, read_texts
from gptcore.errors import CorpusError

PAGE = """<!DOCTYPE html><html><head><title>Title</title><style>p {color: red}</style><script>var hidden = 1;</script>
</head><body><nav><a href="/">Home</a></nav><div role="navigation">Next page</div><h1>Heading &amp; more</h1>
<p>A <b>bold</b> word,
an <a href="u">link</a>.</p><pre>def f(x):
    return 1
</pre><ul><li>One</li><li>Two</li></ul><table><tr><th>Name</th><th>Value</th></tr><tr><td>a</td><td>café</td></tr></table>
<p hidden>Hidden</p><img alt="Picture"><template>Template</template></body></html>"""


def read(data: bytes, filename: str, options: ReadOptions | None = None) -> list[tuple[str, str]]:
    texts = read_texts(io.BytesIO(data), filename, filename, options or ReadOptions())
    return [(name, b"".join(chunks).decode()) for name, chunks in texts]


@pytest.mark.parametrize("suffix", [".html", ".htm", ".xhtml"])
def test_the_visible_text_of_a_page_is_one_document_without_scripts_and_navigation(suffix: str) -> None:
    ((name, text),) = read(PAGE.encode(), f"a{suffix}")
    assert name == f"a{suffix}"
    assert text.split() == (
        "Heading & more A bold word, an link. def f(x): return 1 • One • Two Name Value a café".split()
    )
    assert "def f(x):\n    return 1\n" in text and text.endswith("café\n")


@pytest.mark.parametrize(
    ("data", "options"),
    [
        ("<p>“café”".encode(), ReadOptions()),
        ("<p>“café”".encode("utf-16"), ReadOptions()),
        ("<meta charset=iso-8859-1><p>“café”".encode("cp1252"), ReadOptions()),
        ('<meta content="text/html; charset=koi8-r"><p>“café”'.encode(), ReadOptions(formats={".html": "text"})),
        ('<?xml version="1.0" encoding="shift_jis"?><p>“カフェ”'.encode("shift_jis"), ReadOptions(encoding="cp1252")),
        ("<p>“café”".encode("cp1252"), ReadOptions(encoding="cp1252")),
    ],
)
def test_a_page_has_the_encoding_of_its_mark_its_head_or_the_pipeline(data: bytes, options: ReadOptions) -> None:
    ((_, text),) = read(data, "a.html", options)
    assert "“café”" in text or "“カフェ”" in text


@pytest.mark.parametrize(
    ("page", "problem"),
    [
        ("<p>" + "x" * 16 * 1024 * 1024, "longer than the 16,777,216 bytes of HTML"),
        ("<ul><li>" * 40, "lists that are nested more than 32 deep"),
        ("<p " + " ".join(f"a{number}" for number in range(2000)) + ">", "a tag with more than 1,000 attributes"),
        ("<p " + "".join(f"a{number}='>'" for number in range(2000)) + ">", "a tag with more than 1,000 attributes"),
        ("<p x=a' " + "/".join(f'a{number}=">"' for number in range(2000)), "a tag with more than 1,000 attributes"),
    ],
)
def test_a_page_that_would_take_much_memory_or_time_is_refused(page: str, problem: str) -> None:
    with pytest.raises(CorpusError, match=rf"^a\.html (is|has) {problem}"):
        read(page.encode(), "a.html")


def test_a_deeply_nested_page_is_read() -> None:
    assert read(b"<div>" * 100_000 + b"text", "a.html") == [("a.html", "text\n")]
    assert read(b"", "a.html") == [("a.html", "")]


def test_words_in_scripts_and_values_are_not_attributes() -> None:
    words = "word " * 5000
    page = f"<script>if (a <b) {{'{words}'}}</script><p title='{words}' data-x=\"{words}\">text</p>"
    assert read(page.encode(), "a.html") == [("a.html", "text\n")]


CELLS = [
    {"cell_type": "markdown", "source": ["# Title\n", "Words."]},
    {"cell_type": "code", "source": "print(1)", "outputs": [{"text": ["1\n"]}]},
    {"cell_type": "code", "source": []},
]


def test_a_notebook_is_the_sources_of_its_cells_without_outputs() -> None:
    data = json.dumps({"cells": CELLS, "nbformat": 4}).encode()
    assert read(data, "a.ipynb") == [("a.ipynb", "# Title\nWords.\n\nprint(1)\n")]
    assert read(data, "a.ipynb", ReadOptions(encoding="utf-16")) == read(data, "a.ipynb")
    old = {"worksheets": [{"cells": [CELLS[0], {"cell_type": "code", "input": ["print(1)"]}]}], "nbformat": 3}
    assert read(json.dumps(old).encode(), "a.ipynb") == [("a.ipynb", "# Title\nWords.\n\nprint(1)\n")]


@pytest.mark.parametrize(
    "notebook", [[], {}, {"cells": 1}, {"cells": [{}]}, {"cells": [{"source": 1}]}, {"cells": {"a": 1}}]
)
def test_a_broken_notebook_is_an_error_that_names_it(notebook: Any) -> None:
    with pytest.raises(CorpusError, match=r"^a\.ipynb is not a Jupyter notebook"):
        read(json.dumps(notebook).encode(), "a.ipynb")
    with pytest.raises(CorpusError, match=r"^a\.ipynb is not JSON"):
        read(b'{"cells": [', "a.ipynb")


@pytest.mark.parametrize(
    "head",
    [
        '<script charset="ISO-8859-1" src="x.js"></script><meta charset="utf-8">',
        '<form accept-charset="ISO-8859-1">',
        '<title>Python encoding = latin1 tips</title><META http-equiv=x CONTENT="text/html; charset=utf-8">',
    ],
)
def test_only_a_meta_tag_names_the_encoding_of_a_page(head: str) -> None:
    ((_, text),) = read(f"{head}<body><p>café Zoë</p>".encode(), "a.html")
    assert "café Zoë" in text
