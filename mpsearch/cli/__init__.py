"""The command line."""

from mpsearch.cli.main import main as main
