"""How a page is laid out and what an exported cell may hold."""

import ast
import base64
import json
import re
import struct

import pytest
from notebook_tools import NOTEBOOKS, ROOT

NBS = ROOT / "nbs"
LONGEST_EXPORTED_CELL = 40  # lines
MOST_CODE_CELLS = 25
LARGEST_NOTEBOOK = 600_000  # bytes, outputs included
LARGEST_FIGURE = (680, 380)  # pixels: 6.5 x 3.5 inch at 100 a inch, and a margin for labels
FORBIDDEN_ROOMS = {"utils", "core", "misc", "common", "helpers"}
FORBIDDEN_NAMES = {"dls", "cbs", "tfms", "bs", "nf", "xb", "yb", "df2"}
DEFINITIONS = (ast.FunctionDef, ast.ClassDef)
SHARED_WORDS = re.compile(r"/home/|/root/|/Users/|/tmp/|0x[0-9a-f]{6,}")

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: str(p.relative_to(NBS)))


def cells(path, kind="code"):
    found = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in found if cell["cell_type"] == kind]


def source(cell):
    return "".join(cell["source"])


def is_exported(cell):
    return re.search(r"^#\s*\|\s*export", source(cell), re.M) is not None


def exported(path):
    return [source(cell) for cell in cells(path) if is_exported(cell)]


def lessons(path):
    return [source(cell) for cell in cells(path) if not is_exported(cell)]


def public_definitions(code):
    return [
        node
        for node in ast.parse(code).body
        if isinstance(node, DEFINITIONS) and not node.name.startswith("_")
    ]


def module_of(path):
    return re.search(r"#\|\s*default_exp\s+(\S+)", "\n".join(map(source, cells(path))))


def position(module):
    """Where a module stands in the house: chapter number (ground floor -1), then page number."""
    for path in NOTEBOOKS:
        found = module_of(path)
        if found and f"clinfuse.{found[1]}" == module:
            *chapter, page = path.relative_to(NBS).parts
            number = int(chapter[0].split("_")[0]) if chapter and chapter[0][0].isdigit() else -1
            return number, int(page.split("_")[0])
    raise AssertionError(f"{module} is no page")


def imported_modules(code):
    """The pages that some code imports, whether as `from clinfuse.use.recipes import x` or `from clinfuse.use import recipes`."""
    pages = {f"clinfuse.{module[1]}" for path in NOTEBOOKS if (module := module_of(path))}
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("clinfuse."):
            if node.module in pages:
                yield node.module
            else:
                yield from (f"{node.module}.{name.name}" for name in node.names)


@each_notebook
def test_opens_with_title_and_promise(path):
    assert re.match(r"# \S.*\n\n> \S", source(cells(path, "markdown")[0]))


@each_notebook
def test_module_is_named_by_path(path):
    module = module_of(path)
    parts = [re.sub(r"^\d+_", "", part) for part in path.relative_to(NBS).with_suffix("").parts]
    assert module is None or module[1] == ".".join(parts)
    assert not FORBIDDEN_ROOMS & set(parts)


@each_notebook
def test_imports_point_down(path):
    module = module_of(path)
    if module is None:
        pytest.skip("exports nothing")
    here = position(f"clinfuse.{module[1]}")
    for module_name in imported_modules("\n".join(exported(path))):
        assert position(module_name) < here, f"{module[1]} imports {module_name} above it"


@each_notebook
def test_pages_are_short(path):
    assert len(cells(path)) <= MOST_CODE_CELLS
    assert path.stat().st_size <= LARGEST_NOTEBOOK


@each_notebook
def test_exported_cells_are_short_and_explicit(path):
    for code in exported(path):
        assert len(code.splitlines()) <= LONGEST_EXPORTED_CELL, code[:80]
        assert len(public_definitions(code)) <= 1, code[:80]
        assert not re.search(r"import \*|@patch|store_attr|@delegates", code), code[:80]
        names = {node.id for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Name)}
        assert not names & FORBIDDEN_NAMES, code[:80]


@each_notebook
def test_imports_stand_alone(path):
    for code in exported(path):
        kinds = {
            isinstance(node, (ast.Import, ast.ImportFrom))
            or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))
            for node in ast.parse(code).body
        }
        assert len(kinds) <= 1, f"imports and code share a cell: {code[:80]}"


@each_notebook
def test_public_names_are_documented_and_used(path):
    shown = "\n".join(lessons(path))
    for code in exported(path):
        for node in public_definitions(code):
            assert ast.get_docstring(node), f"{node.name} has no docstring"
            assert re.search(rf"\b{node.name}\b", shown), f"{node.name} is never used on its page"


@each_notebook
def test_evidence_can_fail(path):
    for code in lessons(path):
        assert "expect_fail(lambda" not in code, (
            "expect_fail is a context manager: this tests nothing"
        )
        assert "assert True" not in code


@each_notebook
def test_outputs_are_clean_and_private(path):
    for cell in cells(path):
        assert cell["execution_count"] is None and cell["metadata"] == {}, "run nbdev_clean"
        for output in cell["outputs"]:
            assert output["output_type"] != "error" and output.get("name") != "stderr"
            texts = [v for k, v in output.get("data", {}).items() if k.startswith("text")]
            assert not SHARED_WORDS.search(json.dumps([output.get("text"), texts]))


@each_notebook
def test_figures_fit_a_column(path):
    for cell in cells(path):
        for output in cell["outputs"]:
            if image := output.get("data", {}).get("image/png"):
                header = base64.b64decode("".join(image)[:64])
                width, height = struct.unpack(">II", header[16:24])
                assert width <= LARGEST_FIGURE[0] and height <= LARGEST_FIGURE[1]
