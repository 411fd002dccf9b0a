"""The figures A to H and their CSV alone, without verdicts and page: what the plain script is compared with.

python eight_figures.py RESULTS_FOLDER OUT_FOLDER
"""

import sys
from pathlib import Path

from instrument.results.contents import load
from report.plots.draw import draw_all
from report.tables import all_tables

if __name__ == "__main__":
    draw_all(all_tables(load(Path(sys.argv[1]))), Path(sys.argv[2]), ("svg", "png"), 300, lambda letter: None)
