"""How Sphinx builds the documentation: `python -m tools docs`.

Nothing is fetched: no fonts, no inventories of other projects. The generated pages are written first.
"""

import re
import sys
from importlib.metadata import version as installed
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent)]  # for tools and benchmarks, which no package holds

from tools.docs import write_pages  # noqa: E402

write_pages(HERE)

project = "fxgraft"
author = "The fxgraft authors"
project_copyright = author
try:
    release = version = installed("fxgraft")
except ModuleNotFoundError:  # a source tree that was never installed
    release = version = ""

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_gallery.gen_gallery",
    "sphinx_copybutton",
    "sphinx_design",
]

source_suffix = {".md": "markdown", ".rst": "restructuredtext"}
exclude_patterns = ["_build", "tutorials"]  # the gallery writes pages from the latter
myst_enable_extensions = ["colon_fence", "deflist", "fieldlist"]
myst_heading_anchors = 3

smartquotes = False  # quotes belong to code more often than to prose
html_theme = "furo"
html_title = "fxgraft"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_favicon = "_static/icon.svg"
html_copy_source = False
html_show_sphinx = False
copybutton_prompt_text = "$ "

# The tutorials are scripts. They are run here, one after another, and those that changed alone are run again.
sphinx_gallery_conf = {
    "examples_dirs": "tutorials",
    "gallery_dirs": "generated/tutorials",
    "filename_pattern": r"\.py",
    "within_subsection_order": "tools.docs.tutorial_order",
    "capture_repr": (),  # what is printed, and pictures
    "image_srcset": ["2x"],
    "notebook_extensions": set(),
    "download_all_examples": False,
    "show_signature": False,
    "write_computation_times": False,
    "min_reported_time": 3600,
}

# Docstrings write names of code between single backticks. Not all of them are public, and have a page.
default_role = "literal"
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 88
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True

# Types in signatures: those of torch and typing have no page here, and most of those inside fxgraft have none either.
nitpick_ignore_regex = [("py:class", r".*")]


def as_restructured_text(_app, _what, _name, _object, _options, lines):
    """Let the docstrings' own form through: lists below a colon, and stars of signatures."""
    found, listed = [], False
    for index, line in enumerate(lines):
        before = lines[index - 1] if index else ""
        deeper = len(line) - len(line.lstrip()) > len(before) - len(before.lstrip())
        if line.strip() and before.endswith(":") and not before.startswith(":") and deeper:
            found.append("")
            listed = True
        listed = listed and bool(line.strip()) and line.startswith(" ")
        if listed:
            line = re.sub(r"^(\s+)([\w, `]+: )", r"\1- \2", line)
        elif (
            found
            and found[-1].lstrip().startswith("- ")
            and line.strip()
            and not line.startswith((" ", "- "))
        ):
            found.append("")
        found.append(re.sub(r"(?<=[\s(,])(\*+)(?=\w)", lambda stars: "\\*" * len(stars[1]), line))
    lines[:] = found


def setup(app):
    """Connect it, behind napoleon, which reads the sections."""
    app.connect("autodoc-process-docstring", as_restructured_text, priority=900)
