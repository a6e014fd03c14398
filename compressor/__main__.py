"""``python -m compressor`` is the `vitrim` command."""

from compressor.cli import main

main()
