"""What an RBM is worth in captioning: the study, its captioner, its controls and its metrics.

``python -m benchmarks.captioning`` from the repository's root; ``pip install '.[captioning]'``
brings what it needs. Nothing of this is part of the installed package.
"""
