"""python -m engram_lm"""

from engram_lm.cli import main

main()
