"""`python -m flashattn_ext.bench`: this package's attention against torch's SDPA, eager attention, and every other CPU
implementation that is installed, in one process; with `--device cuda` against those of a GPU.

cases.py says what is measured, peers.py and peer_*.py who, ceilings.py what the machine can do at most, check.py
whether results are right, run.py takes the times, report.py shows them. cases_cuda.py, peers_cuda.py, ceilings_cuda.py
and run_cuda.py have the same parts for a GPU.
"""
