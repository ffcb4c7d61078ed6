"""What it costs, in full: engines, families, CPUs and GPUs.

.. include:: ../../studies/cost.md
"""
