"""Decide by its name whether a file is read, and in which format. No file is opened here.

Most suffixes say what a file holds. corpus.formats adds suffixes, or says otherwise. formats.py reads the formats.
"""

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from gptcore.config import Format
from gptcore.corpus.compression import COMPRESSED
from gptcore.errors import CorpusError

Formats = Mapping[str, Format] | None
"""corpus.formats; None is the same as an empty one."""

_PROSE = ".txt .text .md .markdown .mdx .mkd .qmd .rmd .rst .adoc .asciidoc .org .textile .wiki .mediawiki .creole"
_MARKUP = ".tex .ltx .sty .cls .bib .texi .texinfo .man .roff .pod .xml .xsl .xslt .xsd .dtd .dita .srt .vtt .po .pot"
_CODE = (
    ".py .pyi .pyx .pxd .ipy .c .h .cc .cpp .cxx .hh .hpp .hxx .inl .cu .cuh .m .mm .java .kt .kts .scala .groovy "
    ".gradle .clj .cljs .cljc .js .mjs .cjs .jsx .ts .mts .cts .tsx .vue .svelte .css .scss .sass .less .go .rs .rb "
    ".erb .php .pl .pm .lua .r .jl .swift .dart .cs .vb .fs .fsi .fsx .hs .lhs .ml .mli .elm .ex .exs .erl .hrl .lisp "
    ".lsp .cl .el .scm .rkt .nim .zig .d .v .sv .vhd .vhdl .pas .pp .f .for .f90 .f95 .f03 .f08 .ada .adb .ads .cob "
    ".cbl .asm .s .sql .graphql .gql .proto .thrift .sol .sh .bash .zsh .fish .ksh .csh .awk .sed .tcl .ps1 .psm1 .bat "
    ".cmd .vim .cmake .mk .mak .make .am .ac .m4 .bzl .bazel .nix .tf .hcl .j2 .jinja .jinja2 .tmpl .tpl .mustache "
    ".hbs .haml .pug .gd .glsl .vert .frag .hlsl .wgsl .metal .cfg .conf .ini .toml .yaml .yml .properties .desktop "
    ".service .diff .patch .in"
)
_FORMATS: dict[str, Format] = {
    **dict.fromkeys((*_PROSE.split(), *_MARKUP.split(), *_CODE.split()), "text"),
    **dict.fromkeys((".html", ".htm", ".xhtml"), "html"),
    ".ipynb": "notebook",
    ".json": "json",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".log": "text",
    ".lock": "text",
    ".map": "text",
}
_NAMED_ONLY = {
    ".json": "most JSON files hold settings",
    ".log": "most logs are written by programs",
    ".lock": "lock files are written by programs",
    ".map": "source maps are written by programs",
    ".min.js": "minified files are written by programs",
    ".min.css": "minified files are written by programs",
}
"""Why directories are not searched for files with these suffixes."""

_REFUSED = {
    ".pdf": ("PDF", "pdftotext -layout FILE FILE.txt"),
    ".ps .eps": ("PostScript", "ps2ascii FILE FILE.txt"),
    ".djvu": ("DjVu", "djvutxt FILE FILE.txt"),
    ".docx .odt .epub .rtf .fb2": ("an office file or electronic book", "pandoc FILE -t plain -o FILE.txt"),
    ".doc .dot .wps .wpd": ("an office file", "libreoffice --headless --convert-to txt:Text FILE"),
    ".xlsx .xls .ods": ("a spreadsheet", "libreoffice --headless --convert-to csv FILE"),
    ".pptx .ppt .odp": (
        "a presentation",
        "libreoffice --headless --convert-to pdf FILE, and then as PDF: pdftotext -layout FILE.pdf",
    ),
    ".tar .tgz .tar.bz2 .tbz2 .tar.xz .txz": ("an archive", "tar xf FILE"),
    ".zip .7z .rar .cbz .cbr": ("an archive", "bsdtar xf FILE"),
    ".bz2": ("bzip2", "bunzip2 FILE"),
    ".xz .lzma": ("xz", "unxz FILE"),
    ".db .sqlite .sqlite3": ("a database", "sqlite3 -csv -header FILE 'select * from TABLE' > TABLE.csv"),
    ".feather .arrow": (
        "a table",
        'python -c \'import pandas; pandas.read_feather("FILE").to_parquet("FILE.parquet")\'',
    ),
    ".orc": ("a table", 'python -c \'import pandas; pandas.read_orc("FILE").to_parquet("FILE.parquet")\''),
}
"""What files hold that hold text which is not read, and a command that converts one."""

_SKIPPED = {
    "a picture": ".png .jpg .jpeg .gif .bmp .tif .tiff .webp .avif .heic .ico .icns .svg .svgz .psd .ai .xcf .raw .dng",
    "sound": ".mp3 .wav .flac .ogg .oga .opus .m4a .aac .aiff .mid .midi .wma",
    "video": ".mp4 .m4v .mkv .webm .avi .mov .mpg .mpeg .wmv .flv .ogv .3gp",
    "a font": ".ttf .otf .woff .woff2 .eot",
    "a compiled program": ".o .a .so .dylib .dll .exe .lib .obj .class .pyc .pyo .pyd .wasm .jar .war .whl .egg .apk",
    "an installation file": ".deb .rpm .dmg .iso .img .msi .pkg .snap",
    "binary data": (
        ".bin .dat .pkl .pickle .joblib .npy .npz .mat .h5 .hdf5 .nc .pt .pth .ckpt .safetensors .onnx .gguf .tflite "
        ".pb .mo .idx .pack .swp .mdb .accdb .dbf .rdb"
    ),
}
_REFUSED_TYPES = {suffix: kind for suffixes, kind in _REFUSED.items() for suffix in suffixes.split()}
_SKIPPED_KINDS = {suffix: kind for kind, suffixes in _SKIPPED.items() for suffix in suffixes.split()}
_SUFFIX = re.compile(r"\.[a-z][a-z0-9_\-]{0,15}")
"""An unknown suffix. Names such as notes.2024 and `St. Mary` have none."""


@dataclass(frozen=True)
class FileType:
    """What a file's name says about reading it."""

    suffix: str
    """In lower case, without .gz or .zst; empty if the name has none."""
    status: Literal["read", "named", "refused", "skipped", "unknown"]
    """read: a directory is searched for it. named: read only if a source names it. refused: it holds text, but in a
    format that is not read. skipped: it holds no text. unknown: the suffix says nothing."""
    format: Format | None
    """How it is read; None if it is not."""
    reason: str
    """Why it is not read, or not in directories, and what to do. Empty if it is read."""


def classify(filename: str, formats: Formats = None) -> FileType:
    """Return what the name of a file says about reading it.

    For example, `a/notes.md.gz` is read as text, `paper.pdf` is refused, and `README` is text.
    """
    suffixes = _list_suffixes(filename)
    for suffix in suffixes:
        if formats and suffix in formats:
            return FileType(suffix, "read", formats[suffix], "")
        if suffix in _NAMED_ONLY:
            return _name_only(suffix)
        if suffix in _FORMATS:
            return FileType(suffix, "read", _FORMATS[suffix], "")
        if suffix in _REFUSED_TYPES:
            kind, command = _REFUSED_TYPES[suffix]
            return FileType(suffix, "refused", None, f"{kind} is not read. Convert it: {command}")
        if suffix in _SKIPPED_KINDS:
            return FileType(suffix, "skipped", None, f"{_SKIPPED_KINDS[suffix]} is not text.")
    if not suffixes or not _SUFFIX.fullmatch(suffixes[-1]):
        return FileType("", "read", "text", "")
    return FileType(suffixes[-1], "unknown", None, _describe_unknown(suffixes[-1], [*_FORMATS, *(formats or ())]))


def require_format(name: str, filename: str, formats: Formats = None) -> Format:
    """Return the format of a file that a source names. Raises CorpusError, which calls it `name`, if it is not read."""
    file_type = classify(filename, formats)
    if file_type.format is None:
        raise CorpusError(f"{name}: {file_type.reason}")
    return file_type.format


def _list_suffixes(filename: str) -> list[str]:
    """Return the suffixes that may say the type: the last two together, as in .tar.bz2, and the last one.

    Compression and numbers after the suffix do not count: those of `a.log.1.gz` are `.log` alone.
    """
    name = filename.lower().rpartition("/")[2].lstrip(".")
    suffixes = [f".{part}" for part in name.split(".")[1:]]
    if suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    while suffixes and suffixes[-1][1:].isdecimal():
        suffixes.pop()
    return ["".join(suffixes[-2:]), suffixes[-1]] if len(suffixes) > 1 else suffixes


def _name_only(suffix: str) -> FileType:
    format_ = _FORMATS.get(suffix, "text")
    fix = f'name them, as in "DIR/*{suffix}", or set corpus.formats: {{"{suffix}": {format_}}}.'
    return FileType(suffix, "named", format_, f"{_NAMED_ONLY[suffix]}; {fix}")


def _describe_unknown(suffix: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(suffix, known, n=1, cutoff=0.75)
    hint = f"; did you mean {near[0]}?" if near else "."
    return f'unknown suffix {suffix}{hint} Set corpus.formats: {{"{suffix}": text}} if it is plain text.'
