"""Number formats as objects: values, codes and scales of each, one family a module."""

from mpsearch.quantizers.formats.format import Format as Format
from mpsearch.quantizers.formats.format import Grid as Grid
from mpsearch.quantizers.formats.registry import FORMATS as FORMATS
from mpsearch.quantizers.formats.registry import format_named as format_named
from mpsearch.quantizers.formats.registry import grid_of as grid_of
