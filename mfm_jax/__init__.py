"""Meta Feature Modulator (arXiv:2008.03428) in JAX: train classifiers on long-tailed data.

Importing the package imports nothing else: `import mfm_jax` costs no JAX start-up and has no side effects.
"""

__version__ = "0.1.0"
