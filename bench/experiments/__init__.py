"""What the results are made of: runs with several seeds, tables of them, and claims about them.

    python -m bench.results [NAME…]

makes what is missing and writes the tables into docs/results.md. An experiment is a list of runs
and the tables that show them; the runs' figures are kept in bench/results/records/.
"""
