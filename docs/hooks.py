"""
Gives the documentation site the layout of the repository (see mkdocs.yml).

README.md is the home page, and the Markdown files of examples/ are pages, so a relative link leads to the same file on
the site, in a checkout and in a code browser. Pages of docs/ keep short addresses: docs/tutorial.md is at tutorial/.
"""

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
OUTSIDE_DOCS = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "examples/**/*.md", "examples/**/*.png",
                "examples/**/*.yaml", "examples/**/*.ipynb")  # fmt: skip
"""Files of the site that are not in docs/: pages, and what they show or link to."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    def add(path: str, **options) -> None:
        files.append(File(path, str(ROOT), config.site_dir, config.use_directory_urls, **options))

    for file in list(files):
        if file.src_dir == config.docs_dir:
            files.remove(file)
            add(f"docs/{file.src_uri}", dest_uri=file.dest_uri, inclusion=file.inclusion)
    for pattern in OUTSIDE_DOCS:
        for path in sorted(ROOT.glob(pattern)):
            add(path.relative_to(ROOT).as_posix())
    return files
