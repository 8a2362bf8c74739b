"""python -m engram_lm.cli"""

from engram_lm.cli import main

main()
