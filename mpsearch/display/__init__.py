"""Pictures and pages. Nothing below imports it; `mpsearch.core.shown` looks it up."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the modules are what the lookup promises
    from mpsearch.core import shown
    from mpsearch.display import figures, fragments, page

    _FRAGMENTS: shown.Fragments = fragments
    _FIGURES: shown.Figures = figures
    _PAGE: shown.Page = page
