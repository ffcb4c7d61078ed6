"""What the studies found, each table under the command that makes it.

.. include:: ../../studies/README.md
"""
