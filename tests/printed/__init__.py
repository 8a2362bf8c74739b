"""What README and docs print, run: pages.py reads them, story.py runs them, stand_ins.py is what they run on."""
