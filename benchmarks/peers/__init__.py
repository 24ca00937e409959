"""Other people's Fast Forward loops and line searches, re-made to be measured on the same work as ours.

One file per peer, each with ``attach(session)``; ``ffkernels.training.peers`` finds them. README.md says what
each does, and which faults it keeps.
"""
