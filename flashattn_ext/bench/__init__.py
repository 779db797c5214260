"""`python -m flashattn_ext.bench`: this package's attention against torch's SDPA, eager attention, and every other CPU
implementation that is installed, in one process.

cases.py says what is measured, peers.py and peer_*.py who, ceilings.py what the machine can do at most, check.py
whether results are right, run.py takes the times, report.py shows them.
"""
